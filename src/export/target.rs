//! What `osprey export --format` can be asked for.

use crate::error::{Error, Result};
use crate::quant::{self, Format};

/// A kind of artifact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Hugging Face directory, f32; ternary matrices as alpha * code.
    Hf,
    /// Hugging Face directory with ternary matrices packed for transformers' `bitnet` quantizer.
    HfBitnet,
    /// The adapter alone, in PEFT's layout.
    Peft,
    GgufF16,
    GgufBf16,
    GgufQ8_0,
    GgufQ4_0,
    GgufQ4K,
    GgufQ6K,
    GgufTq1_0,
    GgufTq2_0,
}

impl Target {
    /// Every target, in the order help texts list them.
    pub const ALL: [Self; 11] = [
        Self::Hf,
        Self::HfBitnet,
        Self::Peft,
        Self::GgufF16,
        Self::GgufBf16,
        Self::GgufQ8_0,
        Self::GgufQ4_0,
        Self::GgufQ4K,
        Self::GgufQ6K,
        Self::GgufTq1_0,
        Self::GgufTq2_0,
    ];

    /// As it is spelled on the command line and in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hf => "hf",
            Self::HfBitnet => "hf-bitnet",
            Self::Peft => "peft",
            Self::GgufF16 => "gguf-f16",
            Self::GgufBf16 => "gguf-bf16",
            Self::GgufQ8_0 => "gguf-q8_0",
            Self::GgufQ4_0 => "gguf-q4_0",
            Self::GgufQ4K => "gguf-q4_k",
            Self::GgufQ6K => "gguf-q6_k",
            Self::GgufTq1_0 => "gguf-tq1_0",
            Self::GgufTq2_0 => "gguf-tq2_0",
        }
    }

    /// The target called `name`.
    ///
    /// # Errors
    /// Lists the names there are.
    pub fn from_name(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|target| target.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::input("format", format!("there is no \"{name}\"")).fix(format!("choose one of {names}"))
        })
    }

    /// What block matrices are stored as; `None` for directories.
    pub fn matrix_format(self) -> Option<&'static dyn Format> {
        match self {
            Self::Hf | Self::HfBitnet | Self::Peft => None,
            Self::GgufF16 => Some(&quant::F16),
            Self::GgufBf16 => Some(&quant::Bf16),
            Self::GgufQ8_0 => Some(&quant::Q8_0),
            Self::GgufQ4_0 => Some(&quant::Q4_0),
            Self::GgufQ4K => Some(&quant::Q4K),
            Self::GgufQ6K => Some(&quant::Q6K),
            Self::GgufTq1_0 => Some(&quant::Tq1_0),
            Self::GgufTq2_0 => Some(&quant::Tq2_0),
        }
    }

    /// Whether ternary matrices keep their codes and scale exactly, packed.
    pub fn packs_ternary(self) -> bool {
        matches!(self, Self::HfBitnet | Self::GgufTq1_0 | Self::GgufTq2_0)
    }

    /// llama.cpp's `general.file_type` number.
    pub(super) fn file_type(self) -> Option<u32> {
        match self {
            Self::Hf | Self::HfBitnet | Self::Peft => None,
            Self::GgufF16 => Some(1),
            Self::GgufQ4_0 => Some(2),
            Self::GgufQ8_0 => Some(7),
            Self::GgufQ4K => Some(14),
            Self::GgufQ6K => Some(18),
            Self::GgufBf16 => Some(32),
            Self::GgufTq1_0 => Some(36),
            Self::GgufTq2_0 => Some(37),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_again_and_others_listed() {
        for target in Target::ALL {
            assert_eq!(Target::from_name(target.name()).unwrap(), target);
        }
        assert!(Target::from_name("gguf-q9").unwrap_err().hint().unwrap().contains("gguf-tq2_0"));
    }
}
