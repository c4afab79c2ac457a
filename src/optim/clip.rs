//! Clipping by the norm of all gradients together. Pascanu et al. 2013, arXiv:1211.5063; factor as `torch.nn.utils.clip_grad_norm_`.
//! g <- g * min(1, limit / (|g| + 1e-6)), |g| over every parameter, summed in f64 in a fixed order.

use rayon::prelude::*;

use super::CHUNK;
use super::reduce::sum_of_squares;

/// The norm of a set of gradients.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GradientNorm {
    /// Euclidean norm; infinite or NaN when a value is.
    pub norm: f64,
    /// The first gradient that holds an infinity or a NaN.
    pub first_not_finite: Option<usize>,
}

/// The norm of all `gradients` together.
pub fn global_norm<'a>(gradients: impl IntoIterator<Item = &'a [f32]>) -> GradientNorm {
    let squares: Vec<f64> = gradients.into_iter().map(sum_of_squares).collect();
    GradientNorm { norm: squares.iter().sum::<f64>().sqrt(), first_not_finite: squares.iter().position(|sum| !sum.is_finite()) }
}

/// What gradients of norm `norm` are multiplied by; a `limit` of 0 means none.
pub fn clip_factor(norm: f64, limit: f64) -> f32 {
    if limit == 0.0 { 1.0 } else { (limit / (norm + 1e-6)).min(1.0) as f32 }
}

/// Multiplies in place; a factor of 1 touches nothing.
pub fn scale(gradient: &mut [f32], factor: f32) {
    if factor != 1.0 {
        gradient.par_chunks_mut(CHUNK).for_each(|chunk| chunk.iter_mut().for_each(|g| *g *= factor));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::testing::random;

    #[test]
    fn clipped_gradients_have_the_limit_as_norm() {
        let mut gradients = [random(1, 70_000), random(2, 9)];
        let before = global_norm(gradients.iter().map(Vec::as_slice));
        assert!((before.norm / 70_009f64.sqrt() - 1.0).abs() < 0.01);
        let factor = clip_factor(before.norm, 0.5);
        gradients.iter_mut().for_each(|gradient| scale(gradient, factor));
        assert!((global_norm(gradients.iter().map(Vec::as_slice)).norm - 0.5).abs() < 1e-6);
    }

    #[test]
    fn small_gradients_and_no_limit_change_nothing() {
        assert_eq!((clip_factor(0.3, 1.0), clip_factor(1e9, 0.0), clip_factor(0.0, 1.0)), (1.0, 1.0, 1.0));
    }

    #[test]
    fn the_bad_gradient_is_named() {
        let found = global_norm([[1.0, 2.0].as_slice(), &[f32::INFINITY], &[f32::NAN]]);
        assert_eq!(found.first_not_finite, Some(1));
    }

    #[test]
    fn threads_do_not_matter() {
        let values = random(4, 5 * CHUNK + 77);
        let with = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| global_norm([values.as_slice()]).norm.to_bits())
        };
        assert_eq!(with(1), with(3));
    }
}
