//! A model ready to run, wherever its weights are.

use super::cuda::CudaModel;
use super::decoder::Decoder;
use super::kv::Format;
use super::model::Model;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::export::adapter::LowRankAdapter;
use crate::export::parameter::Parameter;
use crate::model::Spec;
use crate::ops::cuda::Device;
use std::collections::BTreeMap;

/// A model ready to run.
pub struct Engine {
    spec: Spec,
    tokenizer: Option<Tokenizer>,
    model: Box<dyn Model>,
    pub(super) size: Size,
}

/// What a file's parameters take.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Size {
    /// Number of weights.
    pub weights: usize,
    /// Bytes they are stored in.
    pub weight_bytes: usize,
    /// The smallest format among the matrices of the blocks.
    pub format: &'static str,
    /// Bytes of the file, or of the directory's weights, configuration and tokenizer.
    pub artifact_bytes: u64,
}

impl Size {
    fn of(parameters: &BTreeMap<String, Parameter>) -> Self {
        // Embedding and head often stay in half precision, and rows that blocks do not divide in full; an artifact is called after the
        // smallest format among its blocks' matrices.
        let matrices = parameters.iter().filter(|(name, parameter)| name.contains(".layers.") && parameter.shape.len() == 2);
        let layouts = matrices.map(|(_, parameter)| parameter.format.layout());
        let smallest = layouts.min_by(|a, b| a.bits_per_weight().total_cmp(&b.bits_per_weight()));
        let weight_bytes = parameters.values().map(|parameter| parameter.bytes().len()).sum();
        Self {
            weights: parameters.values().map(Parameter::count).sum(),
            weight_bytes,
            format: smallest.map_or("f32", |layout| layout.name),
            artifact_bytes: weight_bytes as u64,
        }
    }

    /// Average storage cost.
    pub fn bits_per_weight(&self) -> f64 {
        self.weight_bytes as f64 * 8.0 / self.weights as f64
    }
}

impl Engine {
    /// Takes in stored parameters: exactly those of `spec`, matrices row-major with rows in Hugging Face's order.
    ///
    /// # Errors
    /// When one is missing or has another shape.
    pub fn new(spec: Spec, parameters: &BTreeMap<String, Parameter>, tokenizer: Option<Tokenizer>) -> Result<Self> {
        let model = Box::new(Decoder::new(&spec, parameters)?);
        Ok(Self { model, size: Size::of(parameters), tokenizer, spec })
    }

    /// The same on a device, which keeps dense weights in half precision.
    ///
    /// # Errors
    /// When a parameter is missing or has another shape, the device's kernels cannot run such a model, or there is no room for it.
    pub fn on_device<D: Device + 'static>(
        device: D,
        spec: Spec,
        parameters: &BTreeMap<String, Parameter>,
        tokenizer: Option<Tokenizer>,
    ) -> Result<Self> {
        let model = Box::new(CudaModel::new(device, &spec, parameters)?);
        Ok(Self { model, size: Size::of(parameters), tokenizer, spec })
    }

    /// [`Engine::new`] with a low-rank adapter beside the matrices it names; it must fit (see [`LowRankAdapter::check`]).
    ///
    /// # Errors
    /// As [`Engine::new`].
    pub(super) fn adapted(
        spec: Spec,
        parameters: &BTreeMap<String, Parameter>,
        tokenizer: Option<Tokenizer>,
        adapter: LowRankAdapter,
    ) -> Result<Self> {
        let mut size = Size::of(parameters);
        size.weights += adapter.bytes() / size_of::<f32>();
        size.weight_bytes += adapter.bytes();
        let mut decoder = Decoder::new(&spec, parameters)?;
        decoder.adapt(adapter);
        Ok(Self { model: Box::new(decoder), size, tokenizer, spec })
    }

    /// Its shape.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// The tokenizer that came with the weights.
    ///
    /// # Errors
    /// When none came.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().ok_or_else(|| {
            Error::input("model", "has no tokenizer").fix("put tokenizer.json beside the weights, or export with a tokenizer")
        })
    }

    /// What its weights take on disk.
    pub fn size(&self) -> &Size {
        &self.size
    }

    /// Logits of rows of hidden states (`[rows, dim]`), `[rows, vocab]`.
    ///
    /// # Errors
    /// When a device fails; never on the CPU.
    pub fn logits(&self, hidden: &[f32]) -> Result<Vec<f32>> {
        self.model.logits(hidden)
    }

    /// The most exact cache it has: the bits of training on the CPU, f16 on a device.
    pub fn exact_cache(&self) -> Format {
        self.model.exact_cache()
    }

    pub(super) fn model(&self) -> &dyn Model {
        &*self.model
    }
}
