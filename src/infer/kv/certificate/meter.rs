//! An estimate of the error: no bound, but close.

/// What the estimate needs of one page.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PageSquares {
    /// Variance of a logit's error over the page.
    pub score_variance: f64,
    /// Mean squared norm of a value's error.
    pub value_square: f64,
    /// sum_t u_t^2.
    pub squares: f64,
    /// sum_t u_t^2 norm(vhat_t - Ohat)^2.
    pub dispersion: f64,
}

/// H: rounding errors taken as independent, E norm(O - Ohat)^2 = sum_t u_t^2 [var(delta_t) norm(vhat_t - Ohat)^2 + E norm(v_t - vhat_t)^2]
/// to first order in them.
pub fn expected_square<'a>(pages: impl IntoIterator<Item = &'a PageSquares>) -> f64 {
    pages.into_iter().map(|page| page.score_variance * page.dispersion + page.value_square * page.squares).sum()
}
