//! Which pages a query reads. A policy only decides about pages before the query's own, which is always read; the heads that share a
//! key-value head share the decision. What is read is computed as ever, so a policy that reads every page is dense attention bit for bit.

mod dense;
mod quest;
mod top_k;
mod window;

pub use dense::Dense;
pub use quest::Quest;
pub use top_k::TopK;
pub use window::Window;

use crate::error::{Error, Result};
use crate::ops::cpu::attention::TileSet;
use std::fmt;
use std::str::FromStr;

/// The queries of one token that share a key-value head.
#[derive(Clone, Copy, Debug)]
pub struct GroupQuery<'a> {
    /// `[heads of the group, head_dim]`, not scaled.
    pub queries: &'a [f32],
    pub head_dim: usize,
}

impl<'a> GroupQuery<'a> {
    /// The queries, head by head.
    pub fn heads(&self) -> std::slice::ChunksExact<'a, f32> {
        self.queries.chunks_exact(self.head_dim)
    }
}

/// What is known of the pages of one key-value head without reading them.
pub trait PageTable {
    /// Pages before the query's own.
    fn num_pages(&self) -> usize;

    /// For every head of the group an upper bound of its scores `q.k / sqrt(head_dim)` with the keys of a page.
    fn score_bounds(&self, page: usize, query: &GroupQuery<'_>, bounds: &mut [f32]);

    /// For every head of the group how large the largest of these scores is likely to be.
    fn score_estimates(&self, page: usize, query: &GroupQuery<'_>, estimates: &mut [f32]);
}

/// A decision about pages.
pub trait Policy {
    /// Whether `layer` reads every page whatever the policy says of the others.
    fn is_dense_in(&self, layer: usize) -> bool {
        let _ = layer;
        false
    }

    /// Whether it asks for score bounds.
    fn needs_bounds(&self) -> bool {
        false
    }

    /// Whether it asks for score estimates.
    fn needs_estimates(&self) -> bool {
        false
    }

    /// The pages before its own that a token reads.
    fn pages(&self, query: &GroupQuery<'_>, table: &dyn PageTable) -> TileSet;
}

/// A policy by name.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Attention {
    /// Every page.
    #[default]
    Dense,
    Window(Window),
    Quest(Quest),
    TopK(TopK),
}

impl Attention {
    /// Every policy with its usual settings.
    pub fn all() -> [Self; 4] {
        [Self::Dense, Self::Window(Window::default()), Self::Quest(Quest::default()), Self::TopK(TopK::default())]
    }

    /// As `--attention` spells it, without settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Window(_) => "window",
            Self::Quest(_) => "quest",
            Self::TopK(_) => "top-k",
        }
    }

    /// What decides.
    pub fn policy(&self) -> &dyn Policy {
        match self {
            Self::Dense => &Dense,
            Self::Window(policy) => policy,
            Self::Quest(policy) => policy,
            Self::TopK(policy) => policy,
        }
    }
}

impl fmt::Display for Attention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dense => f.write_str("dense"),
            Self::Window(Window { tokens, .. }) => write!(f, "window={tokens}"),
            Self::Quest(Quest { pages, .. }) => write!(f, "quest={pages}"),
            Self::TopK(TopK { budget, .. }) => write!(f, "top-k={budget}"),
        }
    }
}

impl FromStr for Attention {
    type Err = Error;

    /// `NAME` or `NAME=SETTING`: tokens of the window, pages of `quest`, a share below 1 or a number of pages of `top-k`.
    fn from_str(text: &str) -> Result<Self> {
        let (name, setting) = text.split_once('=').map_or((text, None), |(name, setting)| (name, Some(setting)));
        match (name, setting) {
            ("dense", None) => Ok(Self::Dense),
            ("window", None) => Ok(Self::Window(Window::default())),
            ("window", Some(tokens)) => Ok(Self::Window(Window { tokens: number(text, tokens)?, ..Window::default() })),
            ("quest", None) => Ok(Self::Quest(Quest::default())),
            ("quest", Some(pages)) => Ok(Self::Quest(Quest { pages: number(text, pages)?, ..Quest::default() })),
            ("top-k", None) => Ok(Self::TopK(TopK::default())),
            ("top-k", Some(budget)) => Ok(Self::TopK(TopK { budget: budget.parse()?, ..TopK::default() })),
            _ => Err(Error::input("attention", format!("there is no policy {text:?}"))
                .fix("choose one of dense, window[=TOKENS], quest[=PAGES], top-k[=SHARE or PAGES]")),
        }
    }
}

fn number(text: &str, digits: &str) -> Result<usize> {
    let positive = digits.parse().ok().filter(|number| *number > 0);
    positive
        .ok_or_else(|| Error::input("attention", format!("{text:?} does not end in a positive whole number")).fix("such as window=1024"))
}

/// The `count` largest of `scores` that are not in `chosen` yet, added to it; the first wins among equals, NaN never.
fn take_largest(scores: &[f64], count: usize, chosen: &mut TileSet) {
    let mut order: Vec<usize> = (0..scores.len()).filter(|page| !chosen.contains(*page)).collect();
    let count = count.min(order.len());
    let by_score = |a: &usize, b: &usize| rank(scores[*b]).total_cmp(&rank(scores[*a])).then(a.cmp(b));
    if count < order.len() && count > 0 {
        order.select_nth_unstable_by(count - 1, by_score);
    }
    order[..count].iter().for_each(|page| {
        chosen.insert(*page);
    });
}

fn rank(score: f64) -> f64 {
    // Adding zero makes both zeros equal.
    if score.is_nan() { f64::NEG_INFINITY } else { score + 0.0 }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::{GroupQuery, PageTable};

    /// Bounds given page by page and head by head.
    pub(crate) struct Bounds(pub(crate) Vec<Vec<f32>>);

    impl PageTable for Bounds {
        fn num_pages(&self) -> usize {
            self.0.len()
        }

        fn score_bounds(&self, page: usize, _: &GroupQuery<'_>, bounds: &mut [f32]) {
            bounds.copy_from_slice(&self.0[page]);
        }

        fn score_estimates(&self, page: usize, _: &GroupQuery<'_>, estimates: &mut [f32]) {
            estimates.copy_from_slice(&self.0[page]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::top_k::Budget;
    use super::*;

    #[test]
    fn names_and_settings_round_trip() {
        for policy in Attention::all() {
            assert_eq!(policy.name().parse::<Attention>().unwrap(), policy);
            assert_eq!(policy.to_string().parse::<Attention>().unwrap(), policy);
        }
        let window = |tokens| Attention::Window(Window { tokens, ..Window::default() });
        assert_eq!("window=100".parse::<Attention>().unwrap(), window(100));
        let top_k = |budget| Attention::TopK(TopK { budget, ..TopK::default() });
        assert_eq!("top-k=0.5".parse::<Attention>().unwrap(), top_k(Budget::Share(0.5)));
        assert_eq!("top-k=12".parse::<Attention>().unwrap(), top_k(Budget::Pages(12)));
        for wrong in ["sparse", "dense=1", "window=0", "quest=x", "quest=-1", "top-k=0", "top-k=1.5", "top-k=nan", "window="] {
            assert!(wrong.parse::<Attention>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_largest_come_first_and_ties_by_index() {
        let take = |scores: &[f64], count, already: &[usize]| {
            let mut chosen: TileSet = already.iter().copied().collect();
            take_largest(scores, count, &mut chosen);
            chosen.iter().collect::<Vec<_>>()
        };
        assert_eq!(take(&[1.0, 3.0, 2.0, 3.0], 2, &[]), [1, 3]);
        assert_eq!(take(&[1.0, 1.0, 1.0, 1.0], 2, &[]), [0, 1]);
        assert_eq!(take(&[0.0, -0.0, 0.0], 1, &[0]), [0, 1]);
        assert_eq!(take(&[f64::NAN, -5.0], 1, &[]), [1]);
        assert_eq!(take(&[1.0, 2.0], 9, &[]), [0, 1]);
        assert_eq!(take(&[1.0, 2.0], 0, &[]), [0; 0]);
    }
}
