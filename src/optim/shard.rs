//! Which rank keeps the state of which part of the parameters, so that no state is held twice (ZeRO stage 1, arXiv:1910.02054).
//!
//! Rules that look at whole matrices own whole parameters; the largest go first, each to the rank that has least. Element-wise rules can be
//! cut anywhere, and fill every rank up to its share.

use super::{Assignment, Table, elements};
use std::ops::Range;

/// Part of one parameter, updated and remembered by one rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Place in the [`Table`].
    pub parameter: usize,
    /// Elements of the parameter.
    pub range: Range<usize>,
    pub owner: usize,
}

/// Cuts between elements fall on multiples of this, so that pieces stay aligned for vector loads.
const GRAIN: usize = 16;

/// All parameters of `table` in pieces for `ranks` ranks, in the order of the table.
pub fn pieces(table: &Table, ranks: usize) -> Vec<Piece> {
    let mut load = vec![0usize; ranks];
    let mut pieces = whole(table, &mut load);
    let total: usize = table.rows.iter().map(|row| row.state_bytes).sum();
    let share = total.div_ceil(ranks);
    let mut rank = 0;
    for (parameter, row) in table.rows.iter().enumerate().filter(|(_, row)| row.rule.is_elementwise()) {
        let (count, mut at) = (elements(&row.shape), 0);
        let bytes = row.state_bytes / count;
        while at < count {
            while rank + 1 < ranks && load[rank] + bytes * GRAIN > share {
                rank += 1;
            }
            let room = if rank + 1 == ranks { count } else { (share - load[rank]) / bytes / GRAIN * GRAIN };
            let end = count.min(at + room);
            load[rank] += (end - at) * bytes;
            pieces.push(Piece { parameter, range: at..end, owner: rank });
            at = end;
        }
    }
    pieces.sort_by_key(|piece| (piece.parameter, piece.range.start));
    pieces
}

fn whole(table: &Table, load: &mut [usize]) -> Vec<Piece> {
    let mut matrices: Vec<(usize, &Assignment)> = table.rows.iter().enumerate().filter(|(_, row)| !row.rule.is_elementwise()).collect();
    matrices.sort_by_key(|(index, row)| (std::cmp::Reverse(row.state_bytes), *index));
    let assign = |(parameter, row): (usize, &Assignment)| {
        let owner = (0..load.len()).min_by_key(|&rank| (load[rank], rank)).expect("there is a rank");
        load[owner] += row.state_bytes;
        Piece { parameter, range: 0..elements(&row.shape), owner }
    };
    matrices.into_iter().map(assign).collect()
}

/// Bytes of state on each of `ranks` ranks.
pub fn bytes_per_rank(table: &Table, ranks: usize) -> Vec<usize> {
    let mut bytes = vec![0; ranks];
    for piece in pieces(table, ranks) {
        let row = &table.rows[piece.parameter];
        bytes[piece.owner] += (row.state_bytes as u128 * piece.range.len() as u128 / elements(&row.shape) as u128) as usize;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::{Config, ParameterInfo, Role, RuleName};

    fn table(rule: RuleName) -> Table {
        let mut parameters =
            vec![ParameterInfo::new("embed", [8192, 384], Role::Embedding), ParameterInfo::new("head", [8192, 384], Role::Head)];
        for layer in 0..6 {
            for (name, shape) in
                [("q", [384, 384]), ("k", [192, 384]), ("v", [192, 384]), ("o", [384, 384]), ("up", [1024, 384]), ("down", [384, 1024])]
            {
                parameters.push(ParameterInfo::new(format!("{layer}.{name}"), shape, Role::HiddenMatrix));
            }
            parameters.push(ParameterInfo::new(format!("{layer}.norm"), [384], Role::Gain));
        }
        Table::new(&Config { rule, ..Config::default() }, &parameters).unwrap()
    }

    #[test]
    fn every_element_belongs_to_one_rank_and_shares_are_even() {
        for rule in RuleName::ALL {
            let table = table(rule);
            let total: usize = table.rows.iter().map(|row| row.state_bytes).sum();
            for ranks in [1, 2, 3, 4, 8] {
                let pieces = pieces(&table, ranks);
                for (parameter, row) in table.rows.iter().enumerate() {
                    let mut end = 0;
                    for piece in pieces.iter().filter(|piece| piece.parameter == parameter) {
                        assert_eq!(piece.range.start, end);
                        assert!(piece.owner < ranks && !piece.range.is_empty());
                        end = piece.range.end;
                    }
                    assert_eq!(end, elements(&row.shape), "{}", row.name);
                }
                let bytes = bytes_per_rank(&table, ranks);
                assert_eq!(bytes.iter().sum::<usize>(), total, "{rule:?}");
                let most = *bytes.iter().max().unwrap() as f64;
                assert!(most <= total as f64 / ranks as f64 * 1.05, "{rule:?} over {ranks}: {bytes:?} of {total}");
            }
        }
    }

    #[test]
    fn one_rank_has_whole_parameters() {
        let table = table(RuleName::Muon);
        let found = pieces(&table, 1);
        assert_eq!(found.len(), table.rows.len());
        assert!(
            found
                .iter()
                .zip(&table.rows)
                .enumerate()
                .all(|(at, (piece, row))| piece.parameter == at && piece.range == (0..elements(&row.shape)))
        );
    }
}
