//! Bounds that hold with a probability, for quantizers with subtractive dither: the error of each number is then uniform over a step
//! and independent of the numbers, hence strictly sub-Gaussian with the proxy step^2 / 12. They hold for queries that do not depend on the dither.

/// I: P(some |delta_t| of `tokens` > bound) <= p: sqrt(2 v ln(2 n / p)) with v = sum_c q_c^2 step_c^2 / (12 d), a union over tokens of
/// P(|delta| > x) <= 2 exp(-x^2 / (2 v)).
pub fn dithered_score_error(query: &[f64], steps: &[f64], tokens: usize, p: f64) -> f64 {
    (2.0 * uniform_score_variance(query, steps) * (2.0 * tokens as f64 / p).ln()).sqrt()
}

/// Variance of a logit's error when that of every key channel is uniform over a step: sum_c q_c^2 step_c^2 / (12 d).
pub fn uniform_score_variance(query: &[f64], steps: &[f64]) -> f64 {
    query.iter().zip(steps).map(|(q, step)| (q * step).powi(2)).sum::<f64>() / (12.0 * query.len() as f64)
}

/// J, values: x = sum_t u_t (vhat_t - v_t) has independent coordinates with proxies tau_c^2 = (1/12) sum_t u_t^2 step_tc^2. With
/// probability 1 - p, norm(x)^2 <= sum tau^2 + 2 sqrt(t sum tau^4) + 2 t max tau^2, t = ln(1 / p) (Hsu, Kakade & Zhang 2012,
/// doi:10.1214/ECP.v17-2079).
pub fn dithered_value_error(proxies: &[f64], p: f64) -> f64 {
    let t = (1.0 / p).ln();
    let (sum, squares) = (proxies.iter().sum::<f64>(), proxies.iter().map(|proxy| proxy * proxy).sum::<f64>());
    let largest = proxies.iter().copied().fold(0.0, f64::max);
    (sum + 2.0 * (t * squares).sqrt() + 2.0 * t * largest).sqrt()
}

/// J, keys: O' - O = (1 / sum a_t e^-delta_t) sum_t a_t (e^-delta_t - 1)(v_t - O), and e^-delta - 1 = -delta + r with |r| <= e^Delta - 1 - Delta.
/// The part linear in delta is sub-Gaussian with a covariance of the trace `trace` >= sum_t a_t^2 v_b norm(v_t - O)^2, so with
/// probability 1 - p its norm is at most sqrt(trace (1 + 2 sqrt t + 2 t)), t = ln(1 / p). `rest` >= sum_b (e^Delta_b - 1 - Delta_b) sqrt(rho_b S_b)
/// and `least_mass` <= sum_b rho_b e^-Delta_b, masses and dispersions under a and about O; with those under u, u_t e^(2 Delta) >= a_t.
pub fn dithered_key_error(trace: f64, rest: f64, least_mass: f64, p: f64) -> f64 {
    let t = (1.0 / p).ln();
    ((trace * (1.0 + 2.0 * t.sqrt() + 2.0 * t)).sqrt() + rest) / least_mass
}
