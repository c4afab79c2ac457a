//! Which instruction set the CPU kernels run on, and the macro that compiles one body for each of them.
//!
//! Every kernel gives the same bits on every instruction set (reductions use fixed lanes, products use explicit
//! `f32::mul_add`, and the compiler never contracts or reorders float arithmetic), so the choice is about speed alone.

use std::fmt;
use std::sync::OnceLock;

/// Instruction sets that have their own code path, in ascending order of what they need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust for the build's baseline target.
    Portable,
    /// AVX2 with fused multiply-add.
    Avx2,
    /// AVX-512 F, BW, VL, DQ and VNNI, with AVX2 and fused multiply-add.
    Avx512,
}

impl Isa {
    /// The names the `OSPREY_ISA` variable takes, in ascending order.
    pub const ALL: [Isa; 3] = [Isa::Portable, Isa::Avx2, Isa::Avx512];

    fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        }
    }

    /// The richest instruction set of this CPU.
    pub fn supported() -> Isa {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vnni");
            match (avx2, avx512) {
                (true, true) => Isa::Avx512,
                (true, false) => Isa::Avx2,
                _ => Isa::Portable,
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Portable
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The instruction set in use: the CPU's richest, or the one named by the environment variable `OSPREY_ISA`
/// (`portable`, `avx2`, `avx512`) where the CPU has it. Decided once per process.
pub fn isa() -> Isa {
    #[cfg(test)]
    if let Some(forced) = testing::forced() {
        return forced;
    }
    static CHOSEN: OnceLock<Isa> = OnceLock::new();
    *CHOSEN.get_or_init(|| choose(std::env::var("OSPREY_ISA").ok().as_deref(), Isa::supported()))
}

/// A wish can only lower the instruction set: running code that the CPU lacks would be undefined behaviour.
fn choose(wish: Option<&str>, supported: Isa) -> Isa {
    let wished = wish.and_then(|name| Isa::ALL.into_iter().find(|isa| isa.name().eq_ignore_ascii_case(name.trim())));
    wished.map_or(supported, |isa| isa.min(supported))
}

/// Compiles a function body once per instruction set and dispatches on [`isa()`].
///
/// The body is plain Rust that the compiler can vectorize: loops over fixed chunks (`[f32; 16]`) and `f32::mul_add`.
/// Functions it calls must be `#[inline(always)]`, or they are compiled for the baseline target only. Arguments are plain names;
/// const parameters are allowed. Dispatch costs a load and a branch, so wrap a whole row or tile, never one element.
///
/// ```
/// use osprey::multiversion;
///
/// multiversion! {
///     /// y += alpha * x
///     pub fn scale_add(alpha: f32, x: &[f32], y: &mut [f32]) {
///         for (y, x) in y.iter_mut().zip(x) {
///             *y = alpha.mul_add(*x, *y);
///         }
///     }
/// }
///
/// multiversion! {
///     /// Sum in `LANES` fixed lanes: the same bits on every instruction set.
///     fn lane_sums<const LANES: usize>(x: &[f32]) -> [f32; LANES] {
///         let mut lanes = [0.0; LANES];
///         for chunk in x.chunks(LANES) {
///             for (lane, x) in lanes.iter_mut().zip(chunk) {
///                 *lane += x;
///             }
///         }
///         lanes
///     }
/// }
///
/// let mut y = [1.0, 2.0];
/// scale_add(2.0, &[1.0, 1.0], &mut y);
/// assert_eq!(y, [3.0, 4.0]);
/// assert_eq!(lane_sums::<2>(&[1.0, 2.0, 3.0]), [4.0, 2.0]);
/// ```
#[macro_export]
macro_rules! multiversion {
    (
        $(#[$attribute:meta])*
        $visibility:vis fn $name:ident $(<$(const $constant:ident : $constant_type:ty),+>)? ($($argument:ident : $type:ty),* $(,)?) $(-> $output:ty)?
        $body:block
    ) => {
        $(#[$attribute])*
        #[allow(clippy::too_many_arguments)]
        $visibility fn $name $(<$(const $constant: $constant_type),+>)? ($($argument: $type),*) $(-> $output)? {
            #[inline(always)]
            fn body $(<$(const $constant: $constant_type),+>)? ($($argument: $type),*) $(-> $output)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")]
                fn avx512 $(<$(const $constant: $constant_type),+>)? ($($argument: $type),*) $(-> $output)? {
                    body $(::<$($constant),+>)? ($($argument),*)
                }

                #[target_feature(enable = "avx2,fma")]
                fn avx2 $(<$(const $constant: $constant_type),+>)? ($($argument: $type),*) $(-> $output)? {
                    body $(::<$($constant),+>)? ($($argument),*)
                }

                match $crate::ops::cpu::isa::isa() {
                    // SAFETY: `isa` reports Avx512 only where the CPU has every feature enabled above.
                    $crate::ops::cpu::isa::Isa::Avx512 => return unsafe { avx512 $(::<$($constant),+>)? ($($argument),*) },
                    // SAFETY: `isa` reports Avx2 only where the CPU has AVX2 and FMA.
                    $crate::ops::cpu::isa::Isa::Avx2 => return unsafe { avx2 $(::<$($constant),+>)? ($($argument),*) },
                    $crate::ops::cpu::isa::Isa::Portable => {}
                }
            }
            body $(::<$($constant),+>)? ($($argument),*)
        }
    };
}

/// Runs kernels on each instruction set of this machine, for tests that compare their bits.
#[cfg(test)]
pub(crate) mod testing {
    use super::Isa;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Mutex, PoisonError};

    const NONE: usize = Isa::ALL.len();
    static FORCED: AtomicUsize = AtomicUsize::new(NONE);
    static TURN: Mutex<()> = Mutex::new(());

    pub(super) fn forced() -> Option<Isa> {
        Isa::ALL.get(FORCED.load(Ordering::Relaxed)).copied()
    }

    /// Calls `run` once per supported instruction set with [`super::isa()`] forced to it in the whole process, and returns the results
    /// in ascending order of instruction set. Tests that run meanwhile keep their results, since those do not depend on the choice.
    pub(crate) fn on_every_isa<T>(mut run: impl FnMut() -> T) -> Vec<(Isa, T)> {
        struct Release;
        impl Drop for Release {
            fn drop(&mut self) {
                FORCED.store(NONE, Ordering::Relaxed);
            }
        }
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let _release = Release;
        let force = |(place, isa): (usize, Isa)| {
            FORCED.store(place, Ordering::Relaxed);
            (isa, run())
        };
        Isa::ALL.into_iter().enumerate().filter(|(_, isa)| *isa <= Isa::supported()).map(force).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wish_only_lowers() {
        assert_eq!(choose(None, Isa::Avx2), Isa::Avx2);
        assert_eq!(choose(Some("portable"), Isa::Avx512), Isa::Portable);
        assert_eq!(choose(Some("AVX2"), Isa::Avx512), Isa::Avx2);
        assert_eq!(choose(Some("avx512"), Isa::Avx2), Isa::Avx2);
        assert_eq!(choose(Some("neon"), Isa::Avx512), Isa::Avx512);
    }

    #[test]
    fn names_round_trip() {
        for isa in Isa::ALL {
            assert_eq!(choose(Some(&isa.to_string()), Isa::Avx512), isa);
        }
    }

    multiversion! {
        fn chain<const STRIDE: usize>(x: &[f32], start: f32) -> f32 {
            x.iter().step_by(STRIDE).fold(start, |sum, x| x.mul_add(1.1, sum))
        }
    }

    #[test]
    fn versions_agree() {
        let x: Vec<f32> = (0..100).map(|i| (i as f32 * 0.37).sin()).collect();
        let results = testing::on_every_isa(|| (isa(), chain::<3>(&x, 0.5).to_bits()));
        assert_eq!(results.last().map(|(isa, _)| *isa), Some(Isa::supported()));
        for (isa, (seen, bits)) in &results {
            assert_eq!((isa, bits), (seen, &results[0].1.1));
        }
    }
}
