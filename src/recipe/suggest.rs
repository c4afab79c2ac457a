//! The nearest valid word to a mistyped one.

/// The candidate nearest to `word`, or none when all are too far to be meant. Ties go to the earlier candidate.
pub(super) fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let typed = normalized(word);
    candidates
        .into_iter()
        .filter_map(|candidate| Some((cost(&typed, candidate)?, candidate)))
        .min_by_key(|&(cost, _)| cost)
        .map(|(_, candidate)| candidate)
}

/// Edits from `typed` to `candidate`, or none when more than a third of the longer word would change.
fn cost(typed: &str, candidate: &str) -> Option<usize> {
    let meant = normalized(candidate);
    if initials(candidate) == typed || (typed.len() >= 3 && meant.starts_with(typed)) {
        return Some(1);
    }
    let longest = typed.chars().count().max(meant.chars().count());
    let edits = distance(typed, &meant);
    (edits <= longest.div_ceil(3).min(4)).then_some(edits)
}

fn normalized(word: &str) -> String {
    word.to_lowercase().replace('-', "_")
}

/// `learning_rate` -> `lr`; empty for a single word, which nothing typed equals.
fn initials(word: &str) -> String {
    if !word.contains(['_', '-']) {
        return String::new();
    }
    word.split(['_', '-']).filter_map(|part| part.chars().next()).collect()
}

/// Insertions, deletions, substitutions and swaps of neighbours (optimal string alignment).
fn distance(from: &str, to: &str) -> usize {
    let from: Vec<char> = from.chars().collect();
    let to: Vec<char> = to.chars().collect();
    let mut rows = vec![vec![0usize; to.len() + 1]; from.len() + 1];
    for (i, row) in rows.iter_mut().enumerate() {
        row[0] = i;
    }
    rows[0] = (0..=to.len()).collect();
    for i in 1..=from.len() {
        for j in 1..=to.len() {
            let differs = usize::from(from[i - 1] != to[j - 1]);
            let mut best = (rows[i - 1][j] + 1).min(rows[i][j - 1] + 1).min(rows[i - 1][j - 1] + differs);
            if i > 1 && j > 1 && from[i - 1] == to[j - 2] && from[i - 2] == to[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = best;
        }
    }
    rows[from.len()][to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_of_known_words() {
        for (from, to, edits) in [("", "abc", 3), ("kitten", "sitting", 3), ("steps", "stesp", 1), ("same", "same", 0)] {
            assert_eq!(distance(from, to), edits, "{from} -> {to}");
        }
    }

    #[test]
    fn finds_what_was_meant_and_nothing_far_away() {
        let keys = ["learning_rate", "weight_decay", "rule", "nor-muon"];
        assert_eq!(nearest("lerning_rate", keys), Some("learning_rate"));
        assert_eq!(nearest("learning-rate", keys), Some("learning_rate"));
        assert_eq!(nearest("lr", keys), Some("learning_rate"));
        assert_eq!(nearest("Rule", keys), Some("rule"));
        assert_eq!(nearest("nor_muon", keys), Some("nor-muon"));
        assert_eq!(nearest("zebra", keys), None);
        assert_eq!(nearest("x", []), None);
    }
}
