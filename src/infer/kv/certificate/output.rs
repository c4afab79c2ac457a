//! Errors of an output over read pages.
//!
//! The identity behind D to F: sum u_t (v_t - O') = 0, so O - O' = (1 / W) sum_t u_t (e^delta_t - 1)(v_t - O'). No maximum over pages is
//! taken, and what is common to all values cancels.

/// One page's part in an output.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PagePart {
    /// rho_b: sum of the weights used.
    pub mass: f64,
    /// Delta_b: largest error of a logit; 0 for original keys.
    pub score_error: f64,
    /// Largest norm of a value's error; 0 for original values.
    pub value_error: f64,
    /// S_b: sum of weight times squared distance of the value from the output.
    pub dispersion: f64,
    /// Largest distance of a value from the output.
    pub radius: f64,
}

impl PagePart {
    /// e^Delta - 1.
    fn swing(&self) -> f64 {
        self.score_error.exp_m1()
    }
}

/// W_lo = sum_b rho_b e^-Delta_b, a lower bound of W.
pub fn least_mass(parts: &[PagePart]) -> f64 {
    parts.iter().map(|part| part.mass * (-part.score_error).exp()).sum()
}

/// D: norm(O - O') <= (1 / W_lo) sum_b rho_b (e^Delta_b - 1) radius_b, radii about O'.
pub fn centred_error(parts: &[PagePart]) -> f64 {
    parts.iter().map(|part| part.mass * part.swing() * part.radius).sum::<f64>() / least_mass(parts)
}

/// E: norm(O - O') <= (1 / W_lo) sum_b (e^Delta_b - 1) sqrt(rho_b S_b), dispersions about O'; Cauchy and Schwarz inside each page, so at
/// most D.
pub fn dispersed_error(parts: &[PagePart]) -> f64 {
    parts.iter().map(keys).sum::<f64>() / least_mass(parts)
}

/// F: norm(O - Ohat) <= (1 / W_lo) sum_b [rho_b e^Delta_b eta_b + (e^Delta_b - 1) sqrt(rho_b S_b)], dispersions of the stored values about
/// Ohat: O - Ohat = sum a_t (v_t - vhat_t) + sum (a_t - u_t) vhat_t, and a_t <= u_t e^Delta_b / W_lo.
pub fn total_error(parts: &[PagePart]) -> f64 {
    parts.iter().map(|part| keys(part) + values(part)).sum::<f64>() / least_mass(parts)
}

/// What reading a page's original keys would take off [`total_error`], to first order.
pub fn share_of_keys(part: &PagePart, least_mass: f64) -> f64 {
    keys(part) / least_mass
}

/// What reading a page's original values would take off [`total_error`].
pub fn share_of_values(part: &PagePart, least_mass: f64) -> f64 {
    values(part) / least_mass
}

fn keys(part: &PagePart) -> f64 {
    product(part.swing(), (part.mass * part.dispersion).max(0.0).sqrt())
}

fn values(part: &PagePart) -> f64 {
    product(part.mass * part.score_error.exp(), part.value_error)
}

/// Zero times anything is zero, infinite errors of pages without weight included: they cannot move the output.
fn product(a: f64, b: f64) -> f64 {
    if a == 0.0 || b == 0.0 { 0.0 } else { a * b }
}
