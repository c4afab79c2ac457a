//! What an optimizer is here: a pure step for one parameter. Traversal, clipping, schedules and saving are done once, by
//! [`Optimizer`](super::Optimizer).

/// The scalars of one step of one parameter. They are f64 because they are formed once per tensor and used a million times.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepInfo {
    /// Steps taken before this one, counted over the whole run (so that a resumed run continues the count).
    pub step: u64,
    pub total_steps: u64,
    /// Already scheduled, already multiplied for the parameter's group.
    pub learning_rate: f64,
    /// The schedule's factor in `[0, 1]`, which `learning_rate` contains: for rules that choose their own step length.
    pub schedule: f64,
    /// Decoupled: the weight shrinks by `1 - learning_rate * weight_decay` before the update.
    pub weight_decay: f64,
}

impl StepInfo {
    /// What the weight is multiplied by before the update, when `learning_rate` is the rule's own.
    pub(super) fn keep(&self, learning_rate: f64) -> f32 {
        (1.0 - learning_rate * self.weight_decay) as f32
    }
}

/// The update direction held an infinity or a NaN; parameter and state are as they were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotFinite;

/// One update rule. `shape` is the parameter's logical shape: the last two dimensions are a matrix `[out, in]`, those before
/// them count independent matrices stored one after the other (heads, experts).
pub trait Rule: Send + Sync {
    /// Names and lengths of the pieces of the flat state, in order. Fresh state is all zeros.
    fn state_segments(&self, shape: &[usize]) -> Vec<(&'static str, usize)>;

    /// Changes `parameter` and `state` in place. `gradient` has the parameter's length, `state` has [`Rule::state_len`].
    ///
    /// # Errors
    /// [`NotFinite`] from the rules that look at whole matrices; nothing has changed then.
    fn step(&self, at: &StepInfo, shape: &[usize], parameter: &mut [f32], gradient: &[f32], state: &mut [f32]) -> Result<(), NotFinite>;

    /// Floating-point operations of the matrix products of a step, in the mean over steps. Element-wise rules have none: they are as fast
    /// as memory.
    fn operations(&self, shape: &[usize]) -> f64 {
        let _ = shape;
        0.0
    }

    /// Length of the flat state in f32 values.
    fn state_len(&self, shape: &[usize]) -> usize {
        self.state_segments(shape).iter().map(|(_, length)| length).sum()
    }
}
