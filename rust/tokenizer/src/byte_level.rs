//! The `ByteLevel` alphabet: every byte as a printable character, as files of GPT-2 and its successors write tokens.
//!
//! The 188 printable characters of Latin-1 stand for themselves; the other bytes take U+0100, U+0101, ... in ascending order.

/// Bytes in the order of their ids in a vocabulary of our own: the printable ones ascending, then the others ascending. It is also the
/// order of the alphabet by code point, which decides ties between merges in training.
pub fn bytes_in_id_order() -> [u8; 256] {
    let mut order = [0; 256];
    let all = || 0..=255u8;
    let sorted = all()
        .filter(|&b| is_printable(b))
        .chain(all().filter(|&b| !is_printable(b)));
    for (slot, byte) in order.iter_mut().zip(sorted) {
        *slot = byte;
    }
    order
}

fn is_printable(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

/// First of the characters that stand for bytes that are not printable.
const FIRST_STAND_IN: u32 = 0x100;

/// The two directions of the alphabet.
pub struct Alphabet {
    characters: [char; 256],
    /// By code point; `None` for characters below 0x100 that stand for no byte.
    bytes: Vec<Option<u8>>,
}

impl Alphabet {
    /// The alphabet.
    pub fn new() -> Self {
        let mut characters = ['\0'; 256];
        let mut bytes = vec![None; FIRST_STAND_IN as usize];
        for byte in 0..=255u8 {
            let code_point = if is_printable(byte) {
                bytes[usize::from(byte)] = Some(byte);
                u32::from(byte)
            } else {
                bytes.push(Some(byte));
                bytes.len() as u32 - 1
            };
            characters[usize::from(byte)] = char::from_u32(code_point).unwrap_or_default();
        }
        Self { characters, bytes }
    }

    /// A token's bytes as characters.
    pub fn encode(&self, bytes: &[u8]) -> String {
        bytes
            .iter()
            .map(|&b| self.characters[usize::from(b)])
            .collect()
    }

    /// The bytes behind characters; `None` if one of them is not in the alphabet.
    pub fn decode(&self, text: &str) -> Option<Vec<u8>> {
        text.chars().map(|c| *self.bytes.get(c as usize)?).collect()
    }
}

impl Default for Alphabet {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_of_all_bytes() {
        let alphabet = Alphabet::new();
        let bytes: Vec<u8> = (0..=255).collect();
        let text = alphabet.encode(&bytes);
        assert_eq!(alphabet.decode(&text), Some(bytes));
        assert_eq!(alphabet.encode(b" \n"), "\u{120}\u{10A}");
        assert_eq!(alphabet.decode("\u{144}"), None);
        assert_eq!(alphabet.decode(" "), None);
    }

    #[test]
    fn ids_follow_the_code_points_of_the_alphabet() {
        let alphabet = Alphabet::new();
        let order = bytes_in_id_order();
        let points: Vec<String> = order.iter().map(|&b| alphabet.encode(&[b])).collect();
        assert!(points.is_sorted());
        assert_eq!(order[0], b'!');
        assert_eq!(order[188], 0);
    }
}
