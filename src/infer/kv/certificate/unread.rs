//! What pages that were not read could have changed.

/// A page that was not read.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Unread {
    /// T_b = n_b e^(U_b - m): at least its sum of weights, U_b at least its largest logit.
    pub mass: f64,
    /// At least the distance of any of its values from the output over what was read.
    pub radius: f64,
}

/// G: O - O_R = sum over unread t of a_t (v_t - O_R), so the error is at most sum_b tau_b radius_b with tau_b = T*_b / (R + sum T*), where
/// R is at least `read`, the weights read in the same units, and T*_b is anything from 0 to `mass`.
///
/// Returns the largest value of that: a ratio of linear functions is largest at a corner, and there exactly the pages whose radius is
/// above the value itself take part. Never more than tau max radius with tau = T / (R + T), which is the plain form. The head-tail
/// identity: arXiv:2512.07647.
pub fn unread_error(read: f64, pages: &[Unread]) -> f64 {
    let mut pages: Vec<&Unread> = pages.iter().filter(|page| page.mass > 0.0 || page.mass.is_nan()).collect();
    if pages.iter().any(|page| !(page.mass.is_finite() && page.radius.is_finite())) {
        return f64::INFINITY;
    }
    pages.sort_by(|a, b| b.radius.total_cmp(&a.radius));
    let (mut weight, mut moment) = (read, 0.0);
    for page in pages {
        if weight > 0.0 && page.radius <= moment / weight {
            break;
        }
        weight += page.mass;
        moment += page.mass * page.radius;
    }
    if weight > 0.0 { moment / weight } else { 0.0 }
}
