//! The `ByteLevel` alphabet: every byte as a printable character, as files of GPT-2 and its successors write tokens.
//!
//! The 188 printable characters of Latin-1 stand for themselves; the other bytes take U+0100, U+0101, ... in ascending order.

/// Bytes in the order of their ids in a vocabulary of our own: the printable ones ascending, then the others ascending. It is also the
/// order of the alphabet by code point, which decides ties between merges in training.
pub fn bytes_in_id_order() -> [u8; 256] {
    let mut order = [0; 256];
    let all = || 0..=255u8;
    let sorted = all().filter(|&b| is_printable(b)).chain(all().filter(|&b| !is_printable(b)));
    for (slot, byte) in order.iter_mut().zip(sorted) {
        *slot = byte;
    }
    order
}

fn is_printable(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

/// The two directions of the alphabet.
pub struct Alphabet {
    characters: [char; 256],
}

impl Alphabet {
    /// The alphabet.
    pub fn new() -> Self {
        let mut characters = ['\0'; 256];
        let mut next = 0x100;
        for byte in 0..=255u8 {
            characters[usize::from(byte)] = if is_printable(byte) {
                char::from(byte)
            } else {
                next += 1;
                char::from_u32(next - 1).unwrap_or('\0')
            };
        }
        Self { characters }
    }

    /// A token's bytes as characters.
    pub fn encode(&self, bytes: &[u8]) -> String {
        bytes.iter().map(|&b| self.characters[usize::from(b)]).collect()
    }

    /// The bytes behind characters; `None` if one of them is not in the alphabet.
    pub fn decode(&self, text: &str) -> Option<Vec<u8>> {
        text.chars().map(|c| self.byte(c)).collect()
    }

    fn byte(&self, character: char) -> Option<u8> {
        match u32::from(character) {
            code @ 0..=0xFF => u8::try_from(code).ok().filter(|&b| is_printable(b)),
            // U+0100 + n is the n-th byte that is not printable.
            code @ 0x100..=0x143 => (0..=255u8).filter(|&b| !is_printable(b)).nth(code as usize - 0x100),
            _ => None,
        }
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
