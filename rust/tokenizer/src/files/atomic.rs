//! Files that appear whole or not at all.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process;

use crate::error::{Result, TokenizerError};

/// A file that is written beside its target and renamed over it at the end; dropped before that, it leaves nothing behind.
pub(crate) struct AtomicFile {
    target: PathBuf,
    partial: PathBuf,
    file: Option<File>,
}

impl AtomicFile {
    /// Start writing what will be `target`; folders above it are made.
    pub fn create(target: &Path) -> Result<Self> {
        if let Some(folder) = target
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty())
        {
            fs::create_dir_all(folder).map_err(|error| TokenizerError::io(folder, error))?;
        }
        let mut name = target
            .file_name()
            .map_or_else(OsString::new, ToOwned::to_owned);
        name.push(format!(".{}.partial", process::id()));
        let partial = target.with_file_name(name);
        let file = File::create(&partial).map_err(|error| TokenizerError::io(target, error))?;
        Ok(Self {
            target: target.to_owned(),
            partial,
            file: Some(file),
        })
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        &self.target
    }

    /// The open file.
    pub fn file(&self) -> &File {
        self.file.as_ref().expect("open until committed")
    }

    /// Write all of the contents at once.
    pub fn write(target: &Path, contents: &[u8]) -> Result<()> {
        use std::io::Write;
        let atomic = Self::create(target)?;
        atomic
            .file()
            .write_all(contents)
            .map_err(|error| TokenizerError::io(target, error))?;
        atomic.commit()
    }

    /// Make sure that the contents are on disk, then give the file its name.
    pub fn commit(mut self) -> Result<()> {
        if let Some(file) = self.file.take() {
            file.sync_all()
                .map_err(|error| TokenizerError::io(&self.target, error))?;
        }
        fs::rename(&self.partial, &self.target)
            .map_err(|error| TokenizerError::io(&self.target, error))
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        // After a commit there is nothing under this name; a failure to tidy up has nobody to tell.
        drop(self.file.take());
        let _ = fs::remove_file(&self.partial);
    }
}
