//! How far softmax weights can move when their logits move by at most Delta: total variation, half the sum of |a_t - u_t|.

/// B: tanh(Delta / 2), attained when some set of tokens has the mass 1 / (1 + e^Delta).
///
/// For a set of mass p the worst is +Delta on it and -Delta off it: a - p = p (1 - p)(x - 1) / (1 + p (x - 1)) with x = e^(2 Delta), largest at
/// p = 1 / (1 + sqrt x), where it is (sqrt x - 1) / (sqrt x + 1).
pub fn total_variation(delta: f64) -> f64 {
    (delta / 2.0).tanh()
}

/// C: the least upper bound when only tokens of total mass `tail` (as computed) are disturbed, by at most `delta`. Increases with
/// `delta`; equals B where `tail` is 1.
///
/// With X = e^Delta the best set takes a part p of the tail up by X and the rest of it down by 1/X; the undisturbed head joins the set only
/// when W < 1. With y = 1 - tail (1 - 1/X) + p (X - 1/X), y ranging to its value at p = tail, the gain is (X + z - y - X z / y) / (X - 1/X)
/// with z = y at p = 0, largest at y = sqrt(X z), unless that asks for more than the tail: then the whole tail goes up.
pub fn tail_total_variation(tail: f64, delta: f64) -> f64 {
    let x = delta.exp();
    if tail <= 0.0 || x <= 1.0 {
        return 0.0;
    }
    if tail * tail * (x - 1.0) + 3.0 * tail <= 1.0 {
        return tail * (1.0 - tail) * (x - 1.0) / (1.0 + tail * (x - 1.0));
    }
    // The rest of the tail taken down: what the kept mass is then.
    let kept = 1.0 - tail * (1.0 - 1.0 / x);
    (x.sqrt() - kept.sqrt()).powi(2) / (x - 1.0 / x)
}
