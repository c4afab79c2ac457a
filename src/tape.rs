//! Reverse-mode differentiation over candle tensors.
//!
//! Operations record one closure each. [`Tape::backward`] runs the closures in reverse, moves gradients from consumer to producer,
//! adds in place where a value has several consumers, drops what a closure saved as soon as it has run, and reports every parameter
//! at the moment its gradient is final.
//!
//! Values are rows of activations `[rows, width]`; parameters are leaves whose gradients go to buffers owned by the caller.

use crate::ops::host;
use candle_core::{Result, Tensor};
use std::cell::{Cell, RefCell};

/// Where a value came from, which decides where its gradient goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// Needs no gradient.
    Constant,
    /// Trainable leaf: index into the caller's gradients.
    Parameter(usize),
    /// Result of a recorded operation.
    Node(usize),
}

/// Where the gradient of a value goes, without the value: what a backward closure keeps of an input it need not read again.
#[derive(Clone, Copy, Debug)]
pub struct Target(Origin);

impl Target {
    /// Whether a gradient is wanted.
    pub fn needs_gradient(self) -> bool {
        self.0 != Origin::Constant
    }
}

impl From<&Var> for Target {
    fn from(var: &Var) -> Self {
        Self(var.origin)
    }
}

/// A tensor on a tape.
#[derive(Clone, Debug)]
pub struct Var {
    tensor: Tensor,
    origin: Origin,
}

impl Var {
    /// A value that needs no gradient.
    pub fn constant(tensor: Tensor) -> Self {
        Self { tensor, origin: Origin::Constant }
    }

    /// The trainable leaf whose gradient has place `index` in the caller's [`Gradients`].
    pub fn parameter(index: usize, tensor: Tensor) -> Self {
        Self { tensor, origin: Origin::Parameter(index) }
    }

    /// The value itself.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Whether a gradient flows into this value.
    pub fn needs_gradient(&self) -> bool {
        self.target().needs_gradient()
    }

    /// Where its gradient goes.
    pub fn target(&self) -> Target {
        Target(self.origin)
    }
}

/// Gradients of the parameters, by place; written in place, first write overwriting.
pub trait Gradients {
    /// The buffer of parameter `index`, and whether it already holds a partial sum that must be added to.
    fn slot(&mut self, index: usize) -> (Tensor, bool);
    /// Called once per backward pass for each parameter that took part, when its gradient is final.
    fn finished(&mut self, index: usize) -> Result<()>;
}

type Backward<'a> = Box<dyn FnOnce(&mut Flow<'_>) -> Result<()> + 'a>;

struct Step<'a> {
    /// Parameters this step contributes to.
    parameters: Vec<usize>,
    backward: Backward<'a>,
}

/// The record of one forward pass.
pub struct Tape<'a> {
    steps: RefCell<Vec<Step<'a>>>,
    nodes: Cell<usize>,
    recording: bool,
    fused: bool,
    /// Parameters touched by a forward pass that is not recorded; `Tape::checkpoint` needs them.
    touched: RefCell<Vec<usize>>,
}

impl<'a> Tape<'a> {
    /// A tape that records.
    pub fn new() -> Self {
        Self::with(true, true)
    }

    /// A tape that only evaluates.
    pub fn evaluate() -> Self {
        Self::with(false, true)
    }

    /// The same tape, with every operation on its reference path (candle compositions, any device).
    #[must_use]
    pub fn reference(mut self) -> Self {
        self.fused = false;
        self
    }

    fn with(recording: bool, fused: bool) -> Self {
        Self { steps: RefCell::default(), nodes: Cell::new(0), recording, fused, touched: RefCell::default() }
    }

    /// Whether operations on `tensor` take the fused CPU path.
    pub fn fuses(&self, tensor: &Tensor) -> bool {
        self.fused && host::is_host(tensor)
    }

    /// Whether an operation on `inputs` has to save anything for a backward pass.
    pub fn records(&self, inputs: &[&Var]) -> bool {
        self.recording && inputs.iter().any(|v| v.needs_gradient())
    }

    /// Registers the outputs of an operation. `backward` receives the flow and the output handles; it takes their gradients and adds to
    /// those of `inputs`. It is dropped unrun when nothing upstream needs it.
    pub fn record<const N: usize>(
        &self,
        inputs: &[&Var],
        outputs: [Tensor; N],
        backward: impl FnOnce(&mut Flow<'_>, [Option<Tensor>; N]) -> Result<()> + 'a,
    ) -> [Var; N] {
        self.record_touching(inputs, vec![], outputs, backward)
    }

    /// The same for an operation that also reads the parameters `inside`, which are not among its inputs.
    fn record_touching<const N: usize>(
        &self,
        inputs: &[&Var],
        inside: Vec<usize>,
        outputs: [Tensor; N],
        backward: impl FnOnce(&mut Flow<'_>, [Option<Tensor>; N]) -> Result<()> + 'a,
    ) -> [Var; N] {
        let direct = inputs.iter().filter_map(|v| if let Origin::Parameter(i) = v.origin { Some(i) } else { None });
        let tracked = !inside.is_empty() || inputs.iter().any(|v| v.needs_gradient());
        let parameters: Vec<usize> = direct.chain(inside).collect();
        if !(self.recording && tracked) {
            self.touched.borrow_mut().extend(parameters);
            // Under a checkpoint the outputs must still look differentiable to the operations that follow.
            let origin = if tracked { Origin::Node(usize::MAX) } else { Origin::Constant };
            return outputs.map(|tensor| Var { tensor, origin });
        }
        let first = self.nodes.get();
        self.nodes.set(first + N);
        let run = move |flow: &mut Flow<'_>| {
            let gradients: [Option<Tensor>; N] = std::array::from_fn(|i| flow.take(first + i));
            if gradients.iter().all(Option::is_none) { Ok(()) } else { backward(flow, gradients) }
        };
        self.steps.borrow_mut().push(Step { parameters, backward: Box::new(run) });
        let mut next = first;
        outputs.map(|tensor| {
            next += 1;
            Var { tensor, origin: Origin::Node(next - 1) }
        })
    }

    /// Evaluates `block` without saving its intermediate values and evaluates it again, recorded, when the backward pass gets there.
    pub fn checkpoint<const N: usize>(
        &self,
        inputs: &[&Var],
        block: impl Fn(&Tape<'a>, &[Var]) -> Result<[Var; N]> + 'a,
    ) -> Result<[Var; N]> {
        let owned: Vec<Var> = inputs.iter().map(|&v| v.clone()).collect();
        if !self.recording {
            return block(self, &owned);
        }
        let trial = Tape::with(false, self.fused);
        let outputs = block(&trial, &owned)?.map(|v| v.tensor);
        let parameters = trial.touched.into_inner();
        let fused = self.fused;
        let saved = owned.clone();
        // Frozen inputs do not make the parameters inside frozen.
        let recorded = self.record_touching(&owned.iter().collect::<Vec<_>>(), parameters, outputs, move |flow, gradients| {
            let inner = Tape::with(true, fused);
            // Inputs become nodes of the inner tape so that their gradients can be collected and passed on.
            let leaves: Vec<Var> = saved.iter().map(|v| inner.leaf(v)).collect();
            let results = block(&inner, &leaves)?;
            let mut nested = Flow { slots: vec![], remaining: vec![], gradients: &mut *flow.gradients };
            for (result, gradient) in results.iter().zip(gradients) {
                if let Some(gradient) = gradient {
                    nested.add(result, gradient)?;
                }
            }
            inner.run(&mut nested, |_, _| Ok(()))?;
            let collected: Vec<_> =
                leaves.iter().map(|leaf| if let Origin::Node(i) = leaf.origin { nested.take(i) } else { None }).collect();
            for (input, gradient) in saved.iter().zip(collected) {
                if let (Origin::Node(_), Some(gradient)) = (input.origin, gradient) {
                    flow.add(input, gradient)?;
                }
            }
            Ok(())
        });
        Ok(recorded)
    }

    /// A node without a producer that stands for `outer`.
    fn leaf(&self, outer: &Var) -> Var {
        match outer.origin {
            Origin::Node(_) => {
                let index = self.nodes.get();
                self.nodes.set(index + 1);
                Var { tensor: outer.tensor.clone(), origin: Origin::Node(index) }
            }
            _ => outer.clone(),
        }
    }

    /// Propagates from `root`, whose gradient with respect to itself is `seed`, to every parameter.
    pub fn backward(self, root: &Var, seed: Tensor, gradients: &mut dyn Gradients) -> Result<()> {
        let mut flow = Flow { slots: vec![], remaining: vec![], gradients };
        flow.add(root, seed)?;
        for step in self.steps.borrow().iter() {
            for &parameter in &step.parameters {
                flow.count(parameter);
            }
        }
        self.run(&mut flow, |flow, parameters| parameters.iter().try_for_each(|&p| flow.release(p)))
    }

    fn run<'f>(&self, flow: &mut Flow<'f>, mut after: impl FnMut(&mut Flow<'f>, &[usize]) -> Result<()>) -> Result<()> {
        loop {
            let Some(step) = self.steps.borrow_mut().pop() else { return Ok(()) };
            (step.backward)(flow)?;
            after(flow, &step.parameters)?;
        }
    }
}

impl Default for Tape<'_> {
    fn default() -> Self {
        Self::new()
    }
}

struct Slot {
    tensor: Tensor,
    /// Nobody else holds this storage, so it may be added to in place.
    unique: bool,
}

/// Gradients on their way from the loss to the parameters.
pub struct Flow<'g> {
    slots: Vec<Option<Slot>>,
    /// Uses of each parameter that have not run yet.
    remaining: Vec<usize>,
    gradients: &'g mut dyn Gradients,
}

impl Flow<'_> {
    fn take(&mut self, node: usize) -> Option<Tensor> {
        self.slots.get_mut(node).and_then(Option::take).map(|slot| slot.tensor)
    }

    /// Adds `gradient`, a freshly made tensor that nobody else holds, to that of `target`.
    pub fn add(&mut self, target: impl Into<Target>, gradient: Tensor) -> Result<()> {
        self.add_slot(target.into(), Slot { tensor: gradient, unique: true })
    }

    /// Adds `gradient`, which others may hold as well, to that of `target`.
    pub fn add_shared(&mut self, target: impl Into<Target>, gradient: &Tensor) -> Result<()> {
        self.add_slot(target.into(), Slot { tensor: gradient.clone(), unique: false })
    }

    fn add_slot(&mut self, target: Target, incoming: Slot) -> Result<()> {
        match target.0 {
            Origin::Constant => Ok(()),
            Origin::Parameter(index) => {
                let (buffer, holds_sum) = self.gradients.slot(index);
                if holds_sum { add_in_place(&buffer, &incoming.tensor) } else { copy_into(&buffer, &incoming.tensor) }
            }
            Origin::Node(node) => {
                if self.slots.len() <= node {
                    self.slots.resize_with(node + 1, || None);
                }
                self.slots[node] = Some(match self.slots[node].take() {
                    None => incoming,
                    Some(held) => merge(held, incoming)?,
                });
                Ok(())
            }
        }
    }

    /// Lets a fused kernel write the gradient of a parameter directly into its buffer: `write(elements, add_to_what_is_there)`.
    /// Returns false, without calling it, when `target` is not a parameter in main memory.
    pub fn write_parameter(&mut self, target: impl Into<Target>, write: impl FnOnce(&mut [f32], bool)) -> Result<bool> {
        let Origin::Parameter(index) = target.into().0 else { return Ok(false) };
        let (buffer, holds_sum) = self.gradients.slot(index);
        host::write(&buffer, |elements| write(elements, holds_sum))?;
        Ok(true)
    }

    fn count(&mut self, parameter: usize) {
        if self.remaining.len() <= parameter {
            self.remaining.resize(parameter + 1, 0);
        }
        self.remaining[parameter] += 1;
    }

    fn release(&mut self, parameter: usize) -> Result<()> {
        self.remaining[parameter] -= 1;
        if self.remaining[parameter] == 0 { self.gradients.finished(parameter) } else { Ok(()) }
    }
}

fn merge(held: Slot, incoming: Slot) -> Result<Slot> {
    let (base, other) = if held.unique { (held, incoming) } else { (incoming, held) };
    if base.unique {
        add_in_place(&base.tensor, &other.tensor)?;
        return Ok(base);
    }
    Ok(Slot { tensor: (&base.tensor + &other.tensor)?, unique: true })
}

fn add_in_place(target: &Tensor, other: &Tensor) -> Result<()> {
    if host::is_host(target) {
        let other = other.contiguous()?;
        let source = host::host(&other)?;
        return host::write(target, |elements| crate::ops::cpu::elementwise::add_assign(elements, &source));
    }
    target.slice_set(&(target + other)?.contiguous()?, 0, 0)
}

fn copy_into(target: &Tensor, other: &Tensor) -> Result<()> {
    if host::is_host(target) {
        let other = other.contiguous()?;
        let source = host::host(&other)?;
        return host::write(target, |elements| elements.copy_from_slice(&source));
    }
    target.slice_set(&other.contiguous()?, 0, 0)
}

#[cfg(test)]
mod tests;
