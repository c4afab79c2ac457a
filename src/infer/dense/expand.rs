//! Panels to f32, into a buffer or straight into the product with one row. The same bits on every instruction set.

use super::{Code, PANEL, Run, SCALE_BYTES, View};
use crate::multiversion;
use half::f16;

type Values = [f32; PANEL];

/// Writes inputs `first..first + out.len()` of a single panel.
pub(super) fn expand(view: &View<'_>, first: usize, out: &mut [Values]) {
    assert!(first + out.len() <= view.inputs, "inputs of a panel");
    #[cfg(target_arch = "x86_64")]
    if crate::ops::cpu::isa::isa() == crate::ops::cpu::isa::Isa::Avx512 {
        // SAFETY: the CPU has AVX-512 F, BW and VL; `view` holds whole panels and the inputs exist (asserted).
        return unsafe { avx512::expand(view, first, out) };
    }
    expand_plain(view, first, out);
}

/// `sums[p][j] += x[i] * W[32 p + j, i]` in ascending i for the P panels of `view`.
pub(super) fn multiply<const P: usize>(view: &View<'_>, x: &[f32], sums: &mut [Values]) {
    assert!(x.len() == view.inputs && sums.len() == P && view.bytes.len() == P * view.stride, "operands of a panel product");
    #[cfg(target_arch = "x86_64")]
    if crate::ops::cpu::isa::isa() == crate::ops::cpu::isa::Isa::Avx512 {
        // SAFETY: the CPU has AVX-512 F, BW and VL; the operands have the sizes just asserted.
        return unsafe { avx512::multiply::<P>(view, x, sums) };
    }
    multiply_plain::<P>(view, x, sums);
}

multiversion! {
    fn expand_plain(view: &View<'_>, first: usize, out: &mut [Values]) {
        for run in view.runs(first, first + out.len()) {
            let out = &mut out[run.first - first..run.end - first];
            match view.code {
                Code::F32 => expand_run(out, view.bytes, &run, Code::F32),
                Code::F16 => expand_run(out, view.bytes, &run, Code::F16),
                Code::Bf16 => expand_run(out, view.bytes, &run, Code::Bf16),
                Code::Int8 => expand_run(out, view.bytes, &run, Code::Int8),
                Code::Int4 => expand_run(out, view.bytes, &run, Code::Int4),
            }
        }
    }
}

#[inline(always)]
fn expand_run(out: &mut [Values], panel: &[u8], run: &Run, code: Code) {
    let scales = scales(panel, run, code);
    for (out, codes) in out.iter_mut().zip(panel[run.codes..].chunks_exact(code.step_bytes())) {
        *out = values(codes, code, &scales);
    }
}

multiversion! {
    fn multiply_plain<const P: usize>(view: &View<'_>, x: &[f32], sums: &mut [Values]) {
        for (sums, panel) in sums.iter_mut().zip(view.bytes.chunks_exact(view.stride)) {
            for run in view.runs(0, view.inputs) {
                let x = &x[run.first..run.end];
                match view.code {
                    Code::F32 => multiply_run(sums, panel, x, &run, Code::F32),
                    Code::F16 => multiply_run(sums, panel, x, &run, Code::F16),
                    Code::Bf16 => multiply_run(sums, panel, x, &run, Code::Bf16),
                    Code::Int8 => multiply_run(sums, panel, x, &run, Code::Int8),
                    Code::Int4 => multiply_run(sums, panel, x, &run, Code::Int4),
                }
            }
        }
    }
}

#[inline(always)]
fn multiply_run(sums: &mut Values, panel: &[u8], x: &[f32], run: &Run, code: Code) {
    let scales = scales(panel, run, code);
    let mut partial = *sums;
    for (x, codes) in x.iter().zip(panel[run.codes..].chunks_exact(code.step_bytes())) {
        let weights = values(codes, code, &scales);
        for (sum, weight) in partial.iter_mut().zip(weights) {
            *sum = x.mul_add(weight, *sum);
        }
    }
    *sums = partial;
}

#[inline(always)]
fn scales(panel: &[u8], run: &Run, code: Code) -> Values {
    if !code.has_scales() {
        return [1.0; PANEL];
    }
    let (halves, _) = panel[run.scales..run.scales + SCALE_BYTES].as_chunks::<2>();
    std::array::from_fn(|j| f16::from_le_bytes(halves[j]).to_f32())
}

/// The weights of one input. `code` is a constant wherever this is inlined.
#[inline(always)]
fn values(codes: &[u8], code: Code, scales: &Values) -> Values {
    match code {
        Code::F32 => std::array::from_fn(|j| f32::from_le_bytes([codes[4 * j], codes[4 * j + 1], codes[4 * j + 2], codes[4 * j + 3]])),
        Code::F16 => std::array::from_fn(|j| half_to_f32(u16::from_le_bytes([codes[2 * j], codes[2 * j + 1]]))),
        Code::Bf16 => std::array::from_fn(|j| f32::from_bits(u32::from(u16::from_le_bytes([codes[2 * j], codes[2 * j + 1]])) << 16)),
        Code::Int8 => std::array::from_fn(|j| scales[j] * f32::from(codes[j].cast_signed())),
        Code::Int4 => std::array::from_fn(|j| {
            let code = (codes[j % (PANEL / 2)] >> (4 * (j / (PANEL / 2)))) & 15;
            scales[j] * (f32::from(code) - 8.0)
        }),
    }
}

/// Exact for every finite half, subnormal ones included, without a branch: moves exponent and mantissa into place and rescales.
#[inline(always)]
fn half_to_f32(half: u16) -> f32 {
    /// 2^112: the difference of the exponents' biases.
    const RESCALE: f32 = f32::from_bits((127 + 112) << 23);
    let magnitude = f32::from_bits(u32::from(half & 0x7fff) << 13) * RESCALE;
    // Infinities and NaN: the exponent field becomes all ones.
    let special = if half & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | special | u32::from(half & 0x8000) << 16)
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{Code, PANEL, Run, Values, View};
    use std::arch::x86_64::*;

    type Pair = [__m512; 2];

    /// # Safety
    /// The CPU has the features below, and inputs `first..first + out.len()` exist in the panel.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) unsafe fn expand(view: &View<'_>, first: usize, out: &mut [Values]) {
        // SAFETY: the caller's.
        unsafe {
            match view.code {
                Code::F32 => expand_code::<{ Code::F32 as u8 }>(view, first, out),
                Code::F16 => expand_code::<{ Code::F16 as u8 }>(view, first, out),
                Code::Bf16 => expand_code::<{ Code::Bf16 as u8 }>(view, first, out),
                Code::Int8 => expand_code::<{ Code::Int8 as u8 }>(view, first, out),
                Code::Int4 => expand_code::<{ Code::Int4 as u8 }>(view, first, out),
            }
        }
    }

    /// # Safety
    /// The CPU has the features below, `view` holds P panels, and `x` and `sums` have the sizes of the product.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) unsafe fn multiply<const P: usize>(view: &View<'_>, x: &[f32], sums: &mut [Values]) {
        // SAFETY: the caller's.
        unsafe {
            match view.code {
                Code::F32 => multiply_code::<P, { Code::F32 as u8 }>(view, x, sums),
                Code::F16 => multiply_code::<P, { Code::F16 as u8 }>(view, x, sums),
                Code::Bf16 => multiply_code::<P, { Code::Bf16 as u8 }>(view, x, sums),
                Code::Int8 => multiply_code::<P, { Code::Int8 as u8 }>(view, x, sums),
                Code::Int4 => multiply_code::<P, { Code::Int4 as u8 }>(view, x, sums),
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn expand_code<const CODE: u8>(view: &View<'_>, first: usize, out: &mut [Values]) {
        for run in view.runs(first, first + out.len()) {
            // SAFETY: `runs` stays within the inputs of the panel, which `view.bytes` holds whole.
            unsafe {
                let scales = scales::<CODE>(view.bytes.as_ptr(), &run);
                let mut codes = view.bytes.as_ptr().add(run.codes);
                for out in &mut out[run.first - first..run.end - first] {
                    let values = values::<CODE>(codes, scales);
                    _mm512_storeu_ps(out.as_mut_ptr(), values[0]);
                    _mm512_storeu_ps(out.as_mut_ptr().add(16), values[1]);
                    codes = codes.add(step_bytes::<CODE>());
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn multiply_code<const P: usize, const CODE: u8>(view: &View<'_>, x: &[f32], sums: &mut [Values]) {
        let mut totals = [[_mm512_setzero_ps(); 2]; P];
        for run in view.runs(0, view.inputs) {
            // SAFETY: as in `expand_code`, for each of the P panels, `stride` bytes apart.
            unsafe {
                let panels: [*const u8; P] = std::array::from_fn(|panel| view.bytes.as_ptr().add(panel * view.stride));
                let scales: [Pair; P] = std::array::from_fn(|panel| scales::<CODE>(panels[panel], &run));
                let mut place = run.codes;
                for x in &x[run.first..run.end] {
                    let x = _mm512_set1_ps(*x);
                    for panel in 0..P {
                        let weights = values::<CODE>(panels[panel].add(place), scales[panel]);
                        totals[panel][0] = _mm512_fmadd_ps(x, weights[0], totals[panel][0]);
                        totals[panel][1] = _mm512_fmadd_ps(x, weights[1], totals[panel][1]);
                    }
                    place += step_bytes::<CODE>();
                }
            }
        }
        for (sums, totals) in sums.iter_mut().zip(totals) {
            // SAFETY: `sums` holds 32 floats.
            unsafe {
                _mm512_storeu_ps(sums.as_mut_ptr(), totals[0]);
                _mm512_storeu_ps(sums.as_mut_ptr().add(16), totals[1]);
            }
        }
    }

    const fn code<const CODE: u8>() -> Code {
        match CODE {
            0 => Code::F32,
            1 => Code::F16,
            2 => Code::Bf16,
            3 => Code::Int8,
            _ => Code::Int4,
        }
    }

    const fn step_bytes<const CODE: u8>() -> usize {
        code::<CODE>().step_bytes()
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn scales<const CODE: u8>(panel: *const u8, run: &Run) -> Pair {
        if !const { code::<CODE>().has_scales() } {
            return [_mm512_setzero_ps(); 2];
        }
        // SAFETY: a block begins with 32 halves.
        unsafe { halves(panel.add(run.scales)) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn halves(from: *const u8) -> Pair {
        // SAFETY: the caller's 64 bytes.
        unsafe { [_mm512_cvtph_ps(_mm256_loadu_si256(from.cast())), _mm512_cvtph_ps(_mm256_loadu_si256(from.add(32).cast()))] }
    }

    /// # Safety
    /// `codes` points to one input's codes.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn values<const CODE: u8>(codes: *const u8, scales: Pair) -> Pair {
        // SAFETY: reads exactly `step_bytes` bytes.
        unsafe {
            match const { code::<CODE>() } {
                Code::F32 => [_mm512_loadu_ps(codes.cast()), _mm512_loadu_ps(codes.add(2 * PANEL).cast())],
                Code::F16 => halves(codes),
                Code::Bf16 => {
                    let wide = |from: *const u8| {
                        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()))))
                    };
                    [wide(codes), wide(codes.add(PANEL))]
                }
                Code::Int8 => {
                    let wide = |from: *const u8| _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast())));
                    [_mm512_mul_ps(scales[0], wide(codes)), _mm512_mul_ps(scales[1], wide(codes.add(PANEL / 2)))]
                }
                Code::Int4 => {
                    let pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.cast()));
                    let eight = _mm512_set1_ps(8.0);
                    let low = _mm512_cvtepi32_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(15)));
                    let high = _mm512_cvtepi32_ps(_mm512_srli_epi32::<4>(pairs));
                    [_mm512_mul_ps(scales[0], _mm512_sub_ps(low, eight)), _mm512_mul_ps(scales[1], _mm512_sub_ps(high, eight))]
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_expands_exactly() {
        for bits in 0..=u16::MAX {
            let (ours, exact) = (half_to_f32(bits), f16::from_bits(bits).to_f32());
            assert!(ours == exact && ours.is_sign_negative() == exact.is_sign_negative() || ours.is_nan() && exact.is_nan(), "{bits:#x}");
        }
    }
}
