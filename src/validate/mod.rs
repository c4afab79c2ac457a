//! What a file lost: held-out loss, divergence from a reference, agreement on the next token, skills, size and speed.
//!
//! [`documents`] is the protocol both commands share; [`evaluate()`] measures one model, [`compare()`] an artifact against its reference and
//! says whether it may be shipped.

mod cache;
mod compare;
pub mod documents;
mod evaluate;
pub mod forgetting;
mod limits;
mod places;
pub mod probing;
mod recall;
mod report;
mod rows;
mod skills;
pub mod tasks;

pub use cache::{CacheReport, Classes};
pub use compare::{Options, compare};
pub use documents::{Document, Protocol};
pub use evaluate::{Evaluation, evaluate};
pub use limits::Limits;
pub use places::{Place, places};
pub use report::{Report, SkillPair, SpotPair, TokenLoss, Verdict};
pub use skills::{SkillScore, skills};
pub use tasks::{TaskScore, task};
