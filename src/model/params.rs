//! Name-ordered registry of parameters. Values are views of one flat buffer, laid out role by role, so that the optimizer, clipping and
//! reductions are passes over contiguous memory.

use super::Spec;
use crate::error::{Error, Result};
use crate::tape::{Gradients, Var};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;

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
}

impl Role {
    /// The role of the parameter called `name`.
    pub fn of(name: &str) -> Self {
        match name {
            "model.embed_tokens.weight" => Self::Embedding,
            "lm_head.weight" => Self::Head,
            _ if name.ends_with("norm.weight") => Self::Gain,
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

/// All parameters of a model, in name order.
#[derive(Clone, Debug)]
pub struct Parameters {
    list: Vec<Parameter>,
    flat: Tensor,
}

impl Parameters {
    /// Zeros for every parameter of `spec`.
    pub fn zeros(spec: &Spec, device: &Device) -> Result<Self> {
        let declared = spec.parameters();
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
        Ok(Self { list, flat })
    }

    /// Parameters of `spec` with the given values; every name must be there with its shape.
    pub fn from_tensors(spec: &Spec, tensors: &BTreeMap<String, Tensor>, device: &Device) -> Result<Self> {
        let parameters = Self::zeros(spec, device)?;
        for parameter in &parameters.list {
            let Some(tensor) = tensors.get(&parameter.name) else {
                return Err(Error::input(&parameter.name, "the tensor is missing from the model"));
            };
            if tensor.dims() != parameter.shape {
                let cause = format!("shape {:?} where {:?} is expected", tensor.dims(), parameter.shape);
                return Err(Error::input(&parameter.name, cause));
            }
            let source = tensor.to_dtype(DType::F32)?.to_device(device)?.contiguous()?;
            parameter.value.slice_set(&source, 0, 0)?;
        }
        Ok(parameters)
    }

    /// In name order.
    pub fn list(&self) -> &[Parameter] {
        &self.list
    }

    /// All values as one tensor `[total]`.
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// Number of scalars.
    pub fn total(&self) -> usize {
        self.flat.elem_count()
    }

    /// Place of the parameter called `name`.
    pub fn index(&self, name: &str) -> usize {
        self.list.binary_search_by(|p| p.name.as_str().cmp(name)).unwrap_or_else(|_| panic!("no parameter is called {name}"))
    }

    /// The parameter called `name` as a leaf of a tape.
    pub fn var(&self, name: &str) -> Var {
        let index = self.index(name);
        Var::parameter(index, self.list[index].value.clone())
    }

    /// Names with values.
    pub fn tensors(&self) -> BTreeMap<String, Tensor> {
        self.list.iter().map(|p| (p.name.clone(), p.value.clone())).collect()
    }

    /// A deep copy, sharing nothing.
    pub fn duplicate(&self, spec: &Spec) -> Result<Self> {
        let copy = Self::zeros(spec, self.flat.device())?;
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
        let views = parameters
            .list
            .iter()
            .map(|p| Ok(flat.narrow(0, p.offset, p.len())?.reshape(p.shape.clone())?))
            .collect::<Result<Vec<_>>>()?;
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
