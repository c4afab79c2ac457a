//! How far an attention output over stored keys and values can be from the output over their originals: pure functions in f64.
//!
//! Setting. Of one head, d wide, token t has the original key k_t and value v_t, the stored ones khat_t and vhat_t, the logit
//! s_t = q.k_t / sqrt(d) and the used logit shat_t = s_t - delta_t, |delta_t| <= Delta_b on page b. u = softmax(shat) are the weights used,
//! a = softmax(s) the true ones, rho_b = sum of u over the page. O = sum a_t v_t is the true output, O' = sum u_t v_t, Ohat = sum u_t vhat_t
//! the computed one. W = sum u_t e^delta_t >= W_lo = sum_b rho_b e^-Delta_b, and a_t = u_t e^delta_t / W.
//! Pages read from their originals have Delta_b = 0 and no value error.
//!
//! The setting and the first bounds: Calver 2026, arXiv:2605.20868. Its constants are not tight: tanh(Delta) where tanh(Delta / 2) holds,
//! one Delta for all pages, and values measured from 0 instead of from the output. What is used here is proved beside each function.
//!
//! | form | what it bounds | function |
//! | --- | --- | --- |
//! | A | error of a logit | [`interval_score_error`], [`radius_score_error`], [`grouped_score_error`], [`rounding`] |
//! | B | total variation of the weights | [`total_variation`] |
//! | C | the same, only a tail of known mass disturbed | [`tail_total_variation`] |
//! | D | O - O', by the largest distance of a value from O' | [`centred_error`] |
//! | E | O - O', by the dispersion of each page | [`dispersed_error`] |
//! | F | O - Ohat | [`total_error`] |
//! | G | what pages not read can move | [`unread_error`] |
//! | H | nothing: the error to expect | [`expected_square`] |
//! | I, J | logit and output with subtractive dither, with a probability | [`dithered_score_error`], [`dithered_value_error`], [`dithered_key_error`] |

mod dithered;
#[cfg(test)]
mod heads;
mod meter;
mod output;
mod score;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod trials;
mod unread;
mod variation;

pub use dithered::{dithered_key_error, dithered_score_error, dithered_value_error, uniform_score_variance};
pub use meter::{PageSquares, expected_square};
pub use output::{PagePart, Totals, centred_error, dispersed_error, least_mass, share_of_keys, share_of_values, total_error};
pub use score::{ball_score, box_score, gamma, grouped_score_error, interval_score_error, radius_score_error, rounding};
pub use unread::{Unread, unread_error};
pub use variation::{tail_total_variation, total_variation};
