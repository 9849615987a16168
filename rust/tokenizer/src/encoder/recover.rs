//! From ranks back to merges.

use super::merging::{Scratch, merge_piece_below};
use super::pair_table::PairTable;
use crate::vocabulary::{MergeRule, Parts, Vocabulary};

/// The merges behind ranks, in order of ids: for each token the two tokens that it consists of just before it is made, when all
/// merges of smaller ids are done. `None` if some token does not come down to two.
pub(crate) fn merges_of_ranks(vocabulary: &Vocabulary) -> Option<Vec<(u32, u32)>> {
    let ranked;
    let vocabulary = match vocabulary.rule() {
        MergeRule::Ranks => vocabulary,
        MergeRule::Listed { .. } => {
            ranked = Vocabulary::new(Parts {
                pattern: vocabulary.pattern(),
                rule: MergeRule::Ranks,
                tokens: vocabulary
                    .ordinary()
                    .map(|(id, token)| (id, token.to_vec()))
                    .collect(),
                added: Vec::new(),
            })
            .ok()?;
            &ranked
        }
    };
    let table = PairTable::new(vocabulary);
    let mut scratch = Scratch::default();
    let mut merges = Vec::new();
    let mut pair = Vec::new();
    for (id, token) in vocabulary.ordinary().filter(|(_, token)| token.len() > 1) {
        pair.clear();
        merge_piece_below(
            id,
            &table,
            vocabulary.byte_ids(),
            token,
            &mut scratch,
            &mut pair,
        );
        match pair[..] {
            [left, right] => merges.push((left, right)),
            _ => return None,
        }
    }
    Some(merges)
}
