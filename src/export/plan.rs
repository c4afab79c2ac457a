//! Decides, before anything is written, whether a face can become an artifact, and what each tensor will be. Pure: no weights needed.
//!
//! | format | block matrices | embedding | head | norms |
//! | --- | --- | --- | --- | --- |
//! | f16, bf16 | that | that | that | f32 |
//! | q8_0, q6_k | that | that | that | f32 |
//! | q4_0 | q4_0 | q4_0, tied q8_0 | q8_0 | f32 |
//! | q4_k | q4_k | q4_k, tied q6_k | q6_k | f32 |
//! | tq1_0, tq2_0 | that | f16 | f16 | f32 |
//!
//! A head (or a table that is one) loses most from four bits, so it gets six or eight, as in llama.cpp's own quantizer.
//! Rows that blocks do not divide are stored as f32, exactly; ternary rows are refused, since the point of the face is its size.

use super::config::{self, transformers_class};
use super::fold::folded_spec;
use super::names::{Architecture, gguf_name, is_block_matrix, rotary_heads};
use super::target::Target;
use crate::error::{Error, Result};
use crate::model::{Activation, LinearKind, Spec};
use crate::quant::{self, Format};

/// One tensor of a GGUF artifact.
#[derive(Clone)]
pub struct PlannedTensor {
    /// The parameter it comes from.
    pub parameter: String,
    /// Its name in the file.
    pub name: String,
    pub shape: Vec<usize>,
    pub format: &'static dyn Format,
    /// Rows are permuted to interleaved rotary pairs of this many heads.
    pub interleaved_heads: Option<usize>,
    /// A ternary matrix: what is stored are codes times one scale, never the master weights.
    pub ternary: bool,
}

/// What an artifact will be.
#[derive(Clone)]
pub struct Plan {
    pub target: Target,
    /// `llama`, `qwen3` or `bitnet`, or the Hugging Face class.
    pub architecture: String,
    /// The artifact's own spec: folded; dense unless the target keeps ternary codes.
    pub spec: Spec,
    /// The file's tensors; empty for directories, whose tensors are `spec.parameters()`.
    pub tensors: Vec<PlannedTensor>,
    /// What a user should know, one sentence each.
    pub notes: Vec<String>,
}

/// Which stock engines can hold a face, for `osprey plan`.
pub struct Engines {
    /// The transformers class, or why there is none.
    pub transformers: Result<&'static str>,
    /// The llama.cpp architecture, or why there is none.
    pub llama_cpp: Result<Architecture>,
}

/// Which stock engines can hold `spec`.
pub fn engines(spec: &Spec) -> Engines {
    Engines { transformers: transformers_class(&plain(spec)), llama_cpp: llama_cpp_architecture(spec) }
}

/// Plans the artifact `target` of a model of shape `spec`.
///
/// # Errors
/// When no stock engine could run it; the message names the key in the way and what to set it to.
pub fn plan(spec: &Spec, target: Target) -> Result<Plan> {
    if target == Target::Peft {
        return Err(
            Error::input("peft", "holds an adapter, and this is a whole model").fix("choose hf or a GGUF format, or give an adapter")
        );
    }
    config::check_spec(spec, "model")?;
    if target.packs_ternary() && spec.linear != LinearKind::Ternary {
        return Err(Error::input(target.name(), "holds ternary matrices only, and this model's are dense")
            .fix("choose hf, or a GGUF format that is not ternary"));
    }
    let linear = if target.packs_ternary() { LinearKind::Ternary } else { LinearKind::Dense };
    let result = Spec { linear, ..folded_spec(spec) };
    let mut notes = Vec::new();
    if spec.linear == LinearKind::Ternary && !target.packs_ternary() {
        notes.push("ternary matrices are stored as scale times code; engines run them with unquantized activations".to_owned());
    }
    match target.matrix_format() {
        None => directory_plan(spec, target, result, notes),
        Some(format) => gguf_plan(target, format, spec.linear == LinearKind::Ternary, result, notes),
    }
}

/// What transformers would have to run: folded, ternary matrices dequantized.
fn plain(spec: &Spec) -> Spec {
    Spec { linear: LinearKind::Dense, ..folded_spec(spec) }
}

/// The architecture whose graph computes `spec` once it is folded.
///
/// # Errors
/// Says which key no graph has.
pub fn llama_cpp_architecture(spec: &Spec) -> Result<Architecture> {
    let refuse = |cause: &str, fix: &str| Err(Error::input("llama.cpp", cause).fix(fix));
    if spec.activation == Activation::Relu2Glu {
        return refuse("its llama, qwen3 and bitnet graphs have SiLU built in", "set model.activation = \"swi-glu\"");
    }
    if spec.rope_scaling.is_some() && (spec.qk_norm || spec.sub_norm) {
        return refuse("only its llama graph scales rotary frequencies by Llama 3's rule", "export as hf, or use a model without scaling");
    }
    if !spec.sub_norm {
        return Ok(if spec.qk_norm { Architecture::Qwen3 } else { Architecture::Llama });
    }
    if spec.qk_norm {
        return refuse("no architecture has both SubLN and QK-norm", "set model.sub_norm or model.qk_norm to false");
    }
    if !spec.tied || spec.embedding_projection {
        return refuse(
            "its bitnet architecture has no head of its own",
            "set model.tied = true and model.embedding_projection = false, or model.sub_norm = false",
        );
    }
    if spec.heads * spec.head_dim != spec.dim {
        return refuse("its bitnet architecture has heads that together are as wide as the model", "set model.head_dim to dim / heads");
    }
    Ok(Architecture::Bitnet)
}

fn directory_plan(spec: &Spec, target: Target, result: Spec, notes: Vec<String>) -> Result<Plan> {
    let architecture = transformers_class(&plain(spec))?.to_owned();
    if target == Target::HfBitnet {
        let odd = result.parameters().into_iter().find(|(name, shape)| is_block_matrix(name) && !shape[0].is_multiple_of(4));
        if let Some((name, shape)) = odd {
            return Err(Error::input(name, format!("has {} rows; transformers packs four rows per byte", shape[0]))
                .fix("choose widths that are multiples of 4"));
        }
    }
    Ok(Plan { target, architecture, spec: result, tensors: Vec::new(), notes })
}

/// `ternary` is what the model is, `spec` what the file will be.
fn gguf_plan(target: Target, format: &'static dyn Format, ternary: bool, spec: Spec, mut notes: Vec<String>) -> Result<Plan> {
    let architecture = llama_cpp_architecture(&spec)?;
    let mut tensors = Vec::new();
    let mut unfit = Vec::new();
    for (parameter, shape) in spec.parameters() {
        let wanted = policy(&parameter, &shape, format, spec.tied);
        let width = shape[shape.len() - 1];
        let fits = wanted.layout().holds(width);
        if !fits && target.packs_ternary() {
            let block = wanted.layout().block;
            return Err(Error::input(
                &parameter,
                format!("rows of {width} weights do not fit {}, whose blocks hold {block}", target.name()),
            )
            .fix(format!("make model.dim and model.ffn multiples of {block}, or choose gguf-f16")));
        }
        if !fits {
            unfit.push(format!("{parameter} ({width})"));
        }
        let heads = rotary_heads(&parameter, spec.heads, spec.kv_heads).filter(|_| architecture.interleaves_heads());
        tensors.push(PlannedTensor {
            name: gguf_name(&parameter).ok_or_else(|| Error::input(&parameter, "has no place in a GGUF file"))?,
            format: if fits { wanted } else { &quant::F32 },
            interleaved_heads: heads,
            ternary: ternary && is_block_matrix(&parameter),
            shape,
            parameter,
        });
    }
    if let Some(first) = unfit.first() {
        let block = format.layout().block;
        notes.push(format!("{} matrices whose rows are no multiple of {block} are stored as f32, the first is {first}", unfit.len()));
    }
    Ok(Plan { target, architecture: architecture.name().to_owned(), spec, tensors, notes })
}

/// The table at the top of this file.
fn policy(parameter: &str, shape: &[usize], matrix: &'static dyn Format, tied: bool) -> &'static dyn Format {
    if shape.len() < 2 {
        return &quant::F32;
    }
    if is_block_matrix(parameter) {
        return matrix;
    }
    let is_head = tied || parameter == "lm_head.weight";
    match matrix.layout().name {
        "q4_0" if is_head => &quant::Q8_0,
        "q4_k" if is_head => &quant::Q6K,
        "tq1_0" | "tq2_0" => &quant::F16,
        _ => matrix,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::testing::{spec, ternary_spec};
    use crate::model::Norm;

    fn formats(plan: &Plan, part: &str) -> Vec<&'static str> {
        plan.tensors.iter().filter(|tensor| tensor.name.contains(part)).map(|tensor| tensor.format.layout().name).collect()
    }

    #[test]
    fn faces_meet_their_architectures() {
        let ternary = ternary_spec();
        let sub_norm = Spec { sub_norm: true, tied: true, embedding_projection: false, ..ternary_spec() };
        let cases = [
            (spec(), Some("LlamaForCausalLM"), Some("llama")),
            (Spec { norm: Norm::SingleScale, embedding_projection: true, ..spec() }, Some("LlamaForCausalLM"), Some("llama")),
            (Spec { qk_norm: true, ..spec() }, Some("Qwen3ForCausalLM"), Some("qwen3")),
            (ternary.clone(), Some("LlamaForCausalLM"), Some("llama")),
            (sub_norm.clone(), Some("BitNetForCausalLM"), Some("bitnet")),
            (Spec { tied: false, ..sub_norm.clone() }, Some("BitNetForCausalLM"), None),
            (Spec { activation: Activation::Relu2Glu, ..sub_norm.clone() }, Some("BitNetForCausalLM"), None),
            (Spec { qk_norm: true, ..sub_norm }, None, None),
        ];
        for (spec, transformers, llama_cpp) in cases {
            let engines = engines(&spec);
            assert_eq!(engines.transformers.ok(), transformers, "{spec:?}");
            assert_eq!(engines.llama_cpp.ok().map(Architecture::name), llama_cpp, "{spec:?}");
        }
    }

    #[test]
    fn each_refusal_says_what_to_change() {
        let refusals = [
            plan(&spec(), Target::GgufTq2_0),
            plan(&Spec { activation: Activation::Relu2Glu, ..spec() }, Target::GgufF16),
            plan(&Spec { dim: 192, head_dim: 48, ..ternary_spec() }, Target::GgufTq2_0),
            plan(&Spec { tied: true, ..ternary_spec() }, Target::Hf),
        ];
        for refusal in refusals {
            assert!(refusal.err().unwrap().hint().is_some());
        }
        let width = plan(&Spec { ffn: 500, ..ternary_spec() }, Target::GgufTq2_0).err().unwrap();
        assert!(width.to_string().contains("down_proj") && width.to_string().contains("500"), "{width}");
    }

    #[test]
    fn formats_follow_the_table() {
        let face = Spec { dim: 64, head_dim: 16, ffn: 96, ..spec() };
        let q4 = plan(&face, Target::GgufQ4_0).unwrap();
        assert_eq!(formats(&q4, "attn_q."), ["q4_0"; 2]);
        assert_eq!(formats(&q4, "token_embd"), ["q4_0"]);
        assert_eq!(q4.tensors.iter().find(|tensor| tensor.name == "output.weight").unwrap().format.layout().name, "q8_0");
        assert_eq!(formats(&q4, "_norm"), ["f32"; 5]);
        let tied = plan(&Spec { tied: true, ..face }, Target::GgufQ4_0).unwrap();
        assert_eq!(formats(&tied, "token_embd"), ["q8_0"]);
        let ternary = plan(&ternary_spec(), Target::GgufTq2_0).unwrap();
        assert_eq!((formats(&ternary, "ffn_down"), formats(&ternary, "token_embd")), (vec!["tq2_0"; 2], vec!["f16"]));
        assert_eq!(ternary.spec.linear, LinearKind::Ternary);
        assert_eq!(plan(&ternary_spec(), Target::GgufF16).unwrap().spec.linear, LinearKind::Dense);
    }

    #[test]
    fn rows_that_do_not_fit_are_stored_exactly_and_said_so() {
        let plan = plan(&Spec { dim: 32, head_dim: 8, ..spec() }, Target::GgufQ8_0).unwrap();
        assert_eq!((formats(&plan, "ffn_down"), formats(&plan, "ffn_up")), (vec!["f32"; 2], vec!["q8_0"; 2]));
        assert!(plan.notes[0].contains("mlp.down_proj.weight (40)"), "{:?}", plan.notes);
    }

    #[test]
    fn only_the_llama_architecture_permutes() {
        let count =
            |face: &Spec| plan(face, Target::GgufF16).unwrap().tensors.iter().filter(|tensor| tensor.interleaved_heads.is_some()).count();
        assert_eq!((count(&spec()), count(&Spec { qk_norm: true, ..spec() })), (4, 0));
    }
}
