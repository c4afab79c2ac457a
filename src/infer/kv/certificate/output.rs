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
    pub fn swing(&self) -> f64 {
        swing(self.score_error)
    }
}

/// e^x - 1 for x >= 0, rounded up by less than one part in 10^12. By its series where that is short: bounds of many pages ask for it.
fn swing(x: f64) -> f64 {
    if x > 0.25 {
        return x.exp_m1() * (1.0 + 1e-15);
    }
    /// 1 / 11!, ..., 1 / 2!: the first term left out is below 10^-15 of the sum.
    const INVERSE_FACTORIALS: [f64; 10] = [
        1.0 / 39_916_800.0,
        1.0 / 3_628_800.0,
        1.0 / 362_880.0,
        1.0 / 40_320.0,
        1.0 / 5_040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        1.0 / 2.0,
    ];
    let series = INVERSE_FACTORIALS.iter().fold(0.0, |sum, factor| sum * x + factor) * x + 1.0;
    series * x * (1.0 + 1e-13)
}

/// [`least_mass`] and [`total_error`] of pages added one by one, e^Delta found once for each.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    least_mass: f64,
    error: f64,
}

impl Totals {
    /// Adds a page; `swing` is its [`PagePart::swing`].
    pub fn add(&mut self, part: &PagePart, swing: f64) {
        self.least_mass += part.mass / (1.0 + swing);
        self.error += product(swing, (part.mass * part.dispersion).max(0.0).sqrt());
        self.error += product(product(part.mass, 1.0 + swing), part.value_error);
    }

    /// W_lo.
    pub fn least_mass(&self) -> f64 {
        self.least_mass
    }

    /// F; infinite where so little mass is certain that nothing is known.
    pub fn error(&self) -> f64 {
        let bound = self.error / self.least_mass;
        if bound.is_nan() { f64::INFINITY } else { bound }
    }
}

/// W_lo = sum_b rho_b e^-Delta_b, a lower bound of W.
pub fn least_mass(parts: &[PagePart]) -> f64 {
    parts.iter().map(|part| part.mass * (-part.score_error).exp()).sum()
}

/// D: norm(O - O') <= (1 / W_lo) sum_b rho_b (e^Delta_b - 1) radius_b, radii about O'.
pub fn centred_error(parts: &[PagePart]) -> f64 {
    over_least_mass(parts, |part| product(part.mass, product(part.swing(), part.radius)))
}

/// E: norm(O - O') <= (1 / W_lo) sum_b (e^Delta_b - 1) sqrt(rho_b S_b), dispersions about O'; Cauchy and Schwarz inside each page, so at
/// most D.
pub fn dispersed_error(parts: &[PagePart]) -> f64 {
    over_least_mass(parts, keys)
}

/// F: norm(O - Ohat) <= (1 / W_lo) sum_b [rho_b e^Delta_b eta_b + (e^Delta_b - 1) sqrt(rho_b S_b)], dispersions of the stored values about
/// Ohat: O - Ohat = sum a_t (v_t - vhat_t) + sum (a_t - u_t) vhat_t, and a_t <= u_t e^Delta_b / W_lo.
pub fn total_error(parts: &[PagePart]) -> f64 {
    over_least_mass(parts, |part| keys(part) + values(part))
}

/// What reading a page's original keys would take off [`total_error`], to first order.
pub fn share_of_keys(part: &PagePart, least_mass: f64) -> f64 {
    keys(part) / least_mass
}

/// What reading a page's original values would take off [`total_error`].
pub fn share_of_values(part: &PagePart, least_mass: f64) -> f64 {
    values(part) / least_mass
}

/// Infinite where so little mass is certain that nothing is known.
fn over_least_mass(parts: &[PagePart], of: impl Fn(&PagePart) -> f64) -> f64 {
    let bound = parts.iter().map(of).sum::<f64>() / least_mass(parts);
    if bound.is_nan() { f64::INFINITY } else { bound }
}

fn keys(part: &PagePart) -> f64 {
    product(part.swing(), (part.mass * part.dispersion).max(0.0).sqrt())
}

fn values(part: &PagePart) -> f64 {
    product(product(part.mass, part.score_error.exp()), part.value_error)
}

/// Zero times anything is zero, infinite errors of pages without weight included: they cannot move the output.
fn product(a: f64, b: f64) -> f64 {
    if a == 0.0 || b == 0.0 { 0.0 } else { a * b }
}
