//! Streaming one-dimensional arrays of ids into numpy's `.npy` format (version 1.0).

use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::Path;

use super::AtomicFile;
use crate::error::{Result, TokenizerError};

/// Size of the header: room for any length, and a multiple of 64 as the format asks.
const HEADER: usize = 128;

/// Ids up to this vocabulary size are stored in two bytes each.
const LARGEST_U16: usize = 1 << 16;

/// An array that grows until it is finished.
pub(crate) struct NpyWriter {
    atomic: AtomicFile,
    buffer: Vec<u8>,
    wide: bool,
    num_ids: u64,
}

impl NpyWriter {
    /// Start an array: `uint16` if `vocab_size` ids fit, else `uint32`, little-endian.
    pub fn create(path: &Path, vocab_size: usize) -> Result<Self> {
        let mut writer = Self {
            atomic: AtomicFile::create(path)?,
            buffer: Vec::new(),
            wide: vocab_size > LARGEST_U16,
            num_ids: 0,
        };
        // The length is not known yet: the header is written again at the end.
        writer.write_header()?;
        Ok(writer)
    }

    /// Append ids.
    pub fn append(&mut self, ids: &[u32]) -> Result<()> {
        self.buffer.clear();
        if self.wide {
            self.buffer
                .extend(ids.iter().flat_map(|id| id.to_le_bytes()));
        } else {
            self.buffer
                .extend(ids.iter().flat_map(|&id| (id as u16).to_le_bytes()));
        }
        self.num_ids += ids.len() as u64;
        let mut file = self.atomic.file();
        file.write_all(&self.buffer)
            .map_err(|error| TokenizerError::io(self.atomic.path(), error))
    }

    /// Write the length, and give the file its name. Number of ids.
    pub fn finish(mut self) -> Result<u64> {
        self.write_header()?;
        let num_ids = self.num_ids;
        self.atomic.commit()?;
        Ok(num_ids)
    }

    fn write_header(&mut self) -> Result<()> {
        let kind = if self.wide { "<u4" } else { "<u2" };
        let dict = format!(
            "{{'descr': '{kind}', 'fortran_order': False, 'shape': ({},), }}",
            self.num_ids
        );
        let mut header = b"\x93NUMPY\x01\x00".to_vec();
        header.extend_from_slice(&(HEADER as u16 - 10).to_le_bytes());
        header.extend_from_slice(dict.as_bytes());
        header.resize(HEADER - 1, b' ');
        header.push(b'\n');
        let mut file = BufWriter::new(self.atomic.file());
        let written = file
            .seek(SeekFrom::Start(0))
            .and_then(|_| file.write_all(&header))
            .and_then(|()| file.seek(SeekFrom::End(0)))
            .map(drop);
        written.map_err(|error| TokenizerError::io(self.atomic.path(), error))
    }
}
