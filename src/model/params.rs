//! Name-ordered registry of parameters. Values are views of one flat buffer, laid out role by role, so that the optimizer, clipping and
//! reductions are passes over contiguous memory.

use super::Spec;
use super::adapt::{Adapted, Adapter};
use crate::error::{Error, Result};
use crate::ops::frozen::Frozen;
use crate::ops::rng::Stream;
use crate::tape::{Gradients, Var};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What a parameter does, which decides its optimizer rule, decay and initial distribution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Matrices of the blocks and EmbProj's two maps.
    Hidden,
    /// Token embedding (and, when tied, the head).
    Embedding,
    /// Untied head.
    Head,
    /// Gains of norms.
    Gain,
    /// A tensor of an adapter.
    Adapter,
}

impl Role {
    /// The role of the parameter called `name`.
    pub fn of(name: &str) -> Self {
        match name {
            "model.embed_tokens.weight" => Self::Embedding,
            "lm_head.weight" => Self::Head,
            _ if name.ends_with("norm.weight") => Self::Gain,
            _ if name.rsplit('.').nth(1).is_some_and(|part| part.starts_with("lora_")) => Self::Adapter,
            _ => Self::Hidden,
        }
    }
}

/// One trainable tensor.
#[derive(Clone, Debug)]
pub struct Parameter {
    pub name: String,
    pub shape: Vec<usize>,
    pub role: Role,
    /// First element in the flat buffers.
    pub offset: usize,
    value: Tensor,
}

impl Parameter {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements, which a [`Spec`] never asks for.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values, a view of the flat buffer.
    pub fn value(&self) -> &Tensor {
        &self.value
    }
}

/// All parameters of a model: those that are trained, in name order, and those that are only read.
#[derive(Clone, Debug)]
pub struct Parameters {
    list: Vec<Parameter>,
    flat: Tensor,
    frozen: Arc<BTreeMap<String, Frozen>>,
    adapted: Option<Adapted>,
}

/// A matrix as the forward pass meets it.
#[derive(Clone, Debug)]
pub enum Weight<'p> {
    Trained(Var),
    Frozen(&'p Frozen),
}

impl Parameters {
    /// Zeros for every parameter of `spec`, all trained.
    pub fn zeros(spec: &Spec, device: &Device) -> Result<Self> {
        Self::declared(spec.parameters(), device)
    }

    /// A frozen model with the tensors of an adapter at their start, each drawn from a stream of its own.
    pub fn adapted(frozen: Arc<BTreeMap<String, Frozen>>, adapted: Adapted, seed: u64, device: &Device) -> Result<Self> {
        let mut parameters = Self::declared(adapted.parameters(), device)?;
        for (module, shape) in &adapted.modules {
            for part in adapted.adapter.parts(*shape) {
                let name = format!("{module}.{}", part.0);
                let values = adapted.adapter.initial(&part, &mut Stream::new(seed, &name));
                let source = Tensor::from_vec(values, part.1, &Device::Cpu)?.to_device(device)?;
                parameters.list[parameters.index(&name)].value.slice_set(&source, 0, 0)?;
            }
        }
        (parameters.frozen, parameters.adapted) = (frozen, Some(adapted));
        Ok(parameters)
    }

    /// Zeros for the trained tensors `declared`.
    fn declared(mut declared: Vec<(String, Vec<usize>)>, device: &Device) -> Result<Self> {
        declared.sort();
        let mut order: Vec<usize> = (0..declared.len()).collect();
        order.sort_by_key(|&i| (Role::of(&declared[i].0), i));
        let mut offsets = vec![0; declared.len()];
        let mut total = 0;
        for i in order {
            offsets[i] = total;
            total += declared[i].1.iter().product::<usize>();
        }
        let flat = Tensor::zeros(total, DType::F32, device)?;
        let list = declared
            .into_iter()
            .zip(offsets)
            .map(|((name, shape), offset)| {
                let len = shape.iter().product();
                let value = flat.narrow(0, offset, len)?.reshape(shape.clone())?;
                Ok(Parameter { role: Role::of(&name), name, shape, offset, value })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { list, flat, frozen: Arc::default(), adapted: None })
    }

    /// Parameters of `spec` with the given values; every name must be there with its shape.
    pub fn from_tensors(spec: &Spec, tensors: &BTreeMap<String, Tensor>, device: &Device) -> Result<Self> {
        let parameters = Self::zeros(spec, device)?;
        parameters.fill(tensors)?;
        Ok(parameters)
    }

    /// Sets every trained tensor; each must be among `tensors` with its shape.
    ///
    /// # Errors
    /// Names the first that is missing or has another shape; earlier ones are set already.
    pub fn fill(&self, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        for parameter in &self.list {
            let Some(tensor) = tensors.get(&parameter.name) else {
                return Err(Error::input(&parameter.name, "the tensor is missing from the model"));
            };
            if tensor.dims() != parameter.shape {
                let cause = format!("shape {:?} where {:?} is expected", tensor.dims(), parameter.shape);
                return Err(Error::input(&parameter.name, cause));
            }
            let source = tensor.to_dtype(DType::F32)?.to_device(self.flat.device())?.contiguous()?;
            parameter.value.slice_set(&source, 0, 0)?;
        }
        Ok(())
    }

    /// The trained ones, in name order.
    pub fn list(&self) -> &[Parameter] {
        &self.list
    }

    /// Those that are only read, by name.
    pub fn frozen(&self) -> &BTreeMap<String, Frozen> {
        &self.frozen
    }

    /// The adapter that is trained, where one is.
    pub fn adapter(&self) -> Option<&dyn Adapter> {
        self.adapted.as_ref().map(|adapted| &*adapted.adapter)
    }

    /// All trained values as one tensor `[total]`.
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// Number of trained scalars.
    pub fn total(&self) -> usize {
        self.flat.elem_count()
    }

    /// Place of the trained parameter called `name`.
    pub fn index(&self, name: &str) -> usize {
        self.find(name).unwrap_or_else(|| panic!("no parameter is called {name}"))
    }

    fn find(&self, name: &str) -> Option<usize> {
        self.list.binary_search_by(|p| p.name.as_str().cmp(name)).ok()
    }

    /// The parameter called `name`: a leaf of a tape, or a constant that stored bits are expanded for.
    ///
    /// # Errors
    /// When memory for the expansion cannot be had.
    pub fn var(&self, name: &str) -> Result<Var> {
        match self.weight(name) {
            Weight::Trained(var) => Ok(var),
            Weight::Frozen(frozen) => Ok(Var::constant(frozen.to_tensor(self.flat.device())?)),
        }
    }

    /// The parameter called `name`, without expanding anything.
    pub fn weight(&self, name: &str) -> Weight<'_> {
        match (self.find(name), self.frozen.get(name)) {
            (Some(index), _) => Weight::Trained(self.leaf(index)),
            (None, Some(frozen)) => Weight::Frozen(frozen),
            (None, None) => panic!("no parameter is called {name}"),
        }
    }

    fn leaf(&self, index: usize) -> Var {
        Var::parameter(index, self.list[index].value.clone())
    }

    /// The adapter of the module that holds the matrix `name`, and its tensors.
    pub fn adapter_of(&self, name: &str) -> Option<(&dyn Adapter, Vec<Var>)> {
        let adapted = self.adapted.as_ref()?;
        let module = name.strip_suffix(".weight")?;
        let shape = adapted.modules.get(module)?;
        let parts = adapted.adapter.parts(*shape).into_iter().map(|(part, _)| self.leaf(self.index(&format!("{module}.{part}"))));
        Some((&*adapted.adapter, parts.collect()))
    }

    /// Names with values of what is trained.
    pub fn tensors(&self) -> BTreeMap<String, Tensor> {
        self.list.iter().map(|p| (p.name.clone(), p.value.clone())).collect()
    }

    /// A deep copy of what is trained; frozen weights are shared.
    pub fn duplicate(&self) -> Result<Self> {
        let declared = self.list.iter().map(|parameter| (parameter.name.clone(), parameter.shape.clone())).collect();
        let copy = Self { frozen: self.frozen.clone(), adapted: self.adapted.clone(), ..Self::declared(declared, self.flat.device())? };
        copy.flat.slice_set(&self.flat, 0, 0)?;
        Ok(copy)
    }
}

/// Gradients of [`Parameters`], in the same flat layout. The first contribution after [`GradientBuffers::reset`] overwrites.
pub struct GradientBuffers {
    flat: Tensor,
    views: Vec<Tensor>,
    holds: Vec<bool>,
    finished: Vec<usize>,
}

impl GradientBuffers {
    /// Buffers for `parameters`.
    pub fn new(parameters: &Parameters) -> Result<Self> {
        let flat = parameters.flat.zeros_like()?;
        let views =
            parameters.list.iter().map(|p| Ok(flat.narrow(0, p.offset, p.len())?.reshape(p.shape.clone())?)).collect::<Result<Vec<_>>>()?;
        Ok(Self { flat, holds: vec![false; views.len()], views, finished: vec![] })
    }

    /// Forgets every gradient; memory is kept and overwritten.
    pub fn reset(&mut self) {
        self.holds.fill(false);
        self.finished.clear();
    }

    /// Zeroes the buffers of parameters that no contribution has reached, so that the whole flat buffer is valid.
    pub fn settle(&mut self) -> Result<()> {
        for (view, held) in self.views.iter().zip(&mut self.holds) {
            if !*held {
                view.slice_set(&view.zeros_like()?, 0, 0)?;
                *held = true;
            }
        }
        Ok(())
    }

    /// All gradients as one tensor, in the layout of [`Parameters::flat`].
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// Gradient of the parameter at `index`.
    pub fn view(&self, index: usize) -> &Tensor {
        &self.views[index]
    }

    /// Whether anything has been written for the parameter at `index` since the last reset.
    pub fn holds(&self, index: usize) -> bool {
        self.holds[index]
    }

    /// Parameters in the order in which their gradients became final.
    pub fn finished(&self) -> &[usize] {
        &self.finished
    }
}

impl Gradients for GradientBuffers {
    fn slot(&mut self, index: usize) -> (Tensor, bool) {
        (self.views[index].clone(), std::mem::replace(&mut self.holds[index], true))
    }

    fn finished(&mut self, index: usize) -> candle_core::Result<()> {
        self.finished.push(index);
        Ok(())
    }
}
