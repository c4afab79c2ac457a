//! One object for all parameters: clips, schedules, steps each parameter by its rule, and hands its state to checkpoints.

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::clip::{clip_factor, global_norm, scale};
use super::finch::{self, Decision};
use super::groups::{Assignment, ParameterInfo, Table};
use super::reduce::{squared_distance, sum_of_squares};
use super::rule::{Rule, StepInfo};
use super::shard::{Piece, pieces};
use super::{Config, RuleName, Schedule, elements};
use crate::error::{Error, Result};

/// One parameter in one step. The gradient is clipped in place.
#[derive(Debug)]
pub struct ParameterSlice<'a> {
    pub name: &'a str,
    pub data: &'a mut [f32],
    pub gradient: &'a mut [f32],
}

/// What a step did.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    /// Before clipping.
    pub gradient_norm: f64,
    /// The hidden matrices' scheduled rate.
    pub learning_rate: f64,
    /// How far each parameter moved; empty unless asked for. A rank knows what its own pieces add.
    pub movements: Vec<Movement>,
    /// What a rate that follows the loss did, under such a schedule.
    pub decision: Option<Decision>,
}

/// How far a parameter moved in a step, as sums of squares.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Movement {
    /// Of the change.
    pub change: f64,
    /// Of the values before.
    pub size: f64,
}

impl Movement {
    /// Size of the change over the size before; 0 for a parameter that was zero.
    pub fn ratio(self) -> f64 {
        if self.size == 0.0 { 0.0 } else { self.change.sqrt() / self.size.sqrt() }
    }
}

/// The optimizer of a run. State is one flat buffer per piece of a parameter that this rank owns, all zeros at first; a process by itself
/// owns every parameter in one piece.
pub struct Optimizer {
    config: Config,
    table: Table,
    rules: Vec<(RuleName, Box<dyn Rule>)>,
    /// Of all ranks.
    pieces: Vec<Piece>,
    rank: usize,
    /// One per own piece, in order.
    state: Vec<Vec<f32>>,
    /// What a schedule that follows the loss remembers.
    losses: finch::State,
    total_steps: u64,
}

/// A piece in one step.
struct Part<'a> {
    parameter: usize,
    row: &'a Assignment,
    shape: Vec<usize>,
    data: &'a mut [f32],
    gradient: &'a [f32],
    state: &'a mut [f32],
}
/// Name of that among the state tensors; no parameter has it.
const LOSSES: &str = "schedule.finch.losses";

impl Optimizer {
    /// Assigns `parameters` and allocates their state. A later step expects them in this order.
    ///
    /// # Errors
    /// Impossible settings, or a parameter that cannot be assigned (see [`Table::new`]).
    pub fn new(config: &Config, parameters: &[ParameterInfo], total_steps: u64) -> Result<Self> {
        Self::for_rank(config, parameters, total_steps, 0, 1)
    }

    /// The same for rank `rank` of `ranks`: it keeps the state of its own pieces and updates only them.
    ///
    /// # Errors
    /// As [`Optimizer::new`].
    pub fn for_rank(config: &Config, parameters: &[ParameterInfo], total_steps: u64, rank: usize, ranks: usize) -> Result<Self> {
        config.check(total_steps)?;
        let table = Table::new(config, parameters)?;
        let rules = RuleName::ALL.map(|name| (name, name.build(config))).into();
        let pieces = pieces(&table, ranks);
        let losses = finch::State::default();
        let mut optimizer = Self { config: config.clone(), table, rules, pieces, rank, state: vec![], losses, total_steps };
        let lengths = optimizer.own().map(|piece| optimizer.segments(piece).iter().map(|(_, range)| range.len()).sum());
        optimizer.state = lengths.map(|length: usize| vec![0.0; length]).collect();
        Ok(optimizer)
    }

    /// Pieces of all ranks, in the order of the table.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    fn own(&self) -> impl Iterator<Item = &Piece> {
        self.pieces.iter().filter(|piece| piece.owner == self.rank)
    }

    /// Bytes of state that this rank keeps.
    pub fn state_bytes(&self) -> usize {
        self.state.iter().map(|state| state.len() * size_of::<f32>()).sum()
    }

    /// Who gets what.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// Floating-point operations of the matrix products in one update of all parameters, in the mean over steps.
    pub fn operations(&self) -> f64 {
        self.table.rows.iter().map(|row| row.rule.build(&self.config).operations(&row.logical_shape)).sum()
    }

    /// The scheduled rate of the hidden matrices at `step`; each group's is this times its ratio in the [`Table`].
    pub fn learning_rate(&self, step: u64) -> f64 {
        self.config.learning_rate * self.config.schedule.factor(step, self.total_steps)
    }

    /// Clips all gradients and updates all parameters. `step` counts from 0 over the whole run.
    ///
    /// # Errors
    /// A gradient that is not finite; nothing has changed then.
    ///
    /// # Panics
    /// When `parameters` are not those the optimizer was made for, in their order.
    pub fn step(&mut self, step: u64, parameters: &mut [ParameterSlice<'_>]) -> Result<StepReport> {
        self.run(step, parameters, false)
    }

    /// [`Optimizer::step`], which also measures how far each parameter moved: one more copy and pass over each.
    ///
    /// # Errors
    /// As [`Optimizer::step`].
    ///
    /// # Panics
    /// As [`Optimizer::step`].
    pub fn step_measured(&mut self, step: u64, parameters: &mut [ParameterSlice<'_>]) -> Result<StepReport> {
        self.run(step, parameters, true)
    }

    fn run(&mut self, step: u64, parameters: &mut [ParameterSlice<'_>], measure: bool) -> Result<StepReport> {
        self.recognize(parameters);
        let gradient_norm = self.clip(parameters)?;
        let decision = self.decision();
        let schedule = self.config.schedule.factor(step, self.total_steps) * decision.map_or(1.0, |decision| decision.factor);
        let (rules, config, total_steps) = (&self.rules, &self.config, self.total_steps);
        let update = |part: Part<'_>| {
            let Part { parameter, row, shape, data, gradient, state } = part;
            let at = StepInfo {
                step,
                total_steps,
                learning_rate: config.learning_rate * row.learning_rate_ratio * schedule,
                schedule,
                weight_decay: row.weight_decay,
            };
            let before = if measure { data.to_vec() } else { Vec::new() };
            let rule = rules.iter().find(|(name, _)| *name == row.rule).map(|(_, rule)| rule).expect("every rule is built");
            rule.step(&at, &shape, data, gradient, state)
                .map_err(|_| Error::input(&row.name, format!("the update of step {step} is not finite")).fix(DIVERGED))?;
            Ok((parameter, if measure { movement(&before, data) } else { Movement::default() }))
        };
        let own = self.pieces.iter().filter(|piece| piece.owner == self.rank).zip(&mut self.state);
        let parts = cut(own, parameters, &self.table.rows);
        let moved = parts.into_par_iter().map(update).collect::<Result<Vec<_>>>()?;
        let mut movements = vec![Movement::default(); if measure { self.table.rows.len() } else { 0 }];
        for (parameter, Movement { change, size }) in moved.into_iter().filter(|_| measure) {
            movements[parameter].change += change;
            movements[parameter].size += size;
        }
        Ok(StepReport { gradient_norm, learning_rate: config.learning_rate * schedule, movements, decision })
    }

    /// Tells the loss of the step to come, once per step, to a schedule that follows it; other schedules do not listen.
    pub fn observe(&mut self, loss: f64) {
        if let Schedule::Finch(rule) = &self.config.schedule {
            rule.observe(&mut self.losses, loss);
        }
    }

    fn decision(&self) -> Option<Decision> {
        let Schedule::Finch(rule) = &self.config.schedule else { return None };
        Some(rule.decide(&self.losses))
    }

    fn recognize(&self, parameters: &[ParameterSlice<'_>]) {
        assert_eq!(parameters.len(), self.table.rows.len(), "number of parameters");
        for (slice, row) in parameters.iter().zip(&self.table.rows) {
            assert_eq!(slice.name, row.name, "order of the parameters");
            let length = elements(&row.shape);
            assert!(slice.data.len() == length && slice.gradient.len() == length, "length of {}", row.name);
        }
    }

    /// Returns the norm before clipping.
    fn clip(&self, parameters: &mut [ParameterSlice<'_>]) -> Result<f64> {
        let found = global_norm(parameters.iter().map(|slice| &*slice.gradient));
        if let Some(bad) = found.first_not_finite {
            return Err(Error::input(parameters[bad].name, "its gradient is not finite").fix(DIVERGED));
        }
        let factor = clip_factor(found.norm, self.config.clip);
        parameters.iter_mut().for_each(|slice| scale(slice.gradient, factor));
        Ok(found.norm)
    }

    /// The state by name, `PARAMETER.RULE.SEGMENT`, in the order of the parameters: what a checkpoint must keep besides the step. On one
    /// of several ranks these are its own pieces only; see [`Optimizer::whole_state`].
    pub fn state_tensors(&self) -> impl Iterator<Item = (String, &[f32])> {
        let losses = self.decision().map(|_| (LOSSES.to_owned(), &self.losses[..]));
        let own = self.own().zip(&self.state).flat_map(|(piece, state)| {
            let mut end = 0;
            self.segments(piece).into_iter().map(move |(name, range)| {
                let start = end;
                end += range.len();
                (name, &state[start..end])
            })
        });
        own.chain(losses)
    }

    /// The state of all ranks under the same names, whatever their number. `fetch` is called for every piece of every tensor, in the same
    /// order on all ranks, with its owner and what this rank has of it, and returns the owner's values.
    ///
    /// # Errors
    /// Those of `fetch`.
    pub fn whole_state(&self, mut fetch: impl FnMut(usize, Vec<f32>) -> Result<Vec<f32>>) -> Result<Vec<(String, Vec<f32>)>> {
        let own: BTreeMap<(String, usize), &[f32]> = {
            let starts = self.own().flat_map(|piece| self.segments(piece).into_iter().map(|(_, range)| range.start));
            // The schedule's memory comes last and has no piece: `zip` ends before it.
            self.state_tensors().zip(starts).map(|((name, values), start)| ((name, start), values)).collect()
        };
        let mut tensors: Vec<(String, Vec<f32>)> = vec![];
        for pieces in self.pieces.chunk_by(|a, b| a.parameter == b.parameter) {
            let segments: Vec<_> = pieces.iter().map(|piece| self.segments(piece)).collect();
            for segment in 0..segments[0].len() {
                let mut whole = vec![];
                for (piece, segments) in pieces.iter().zip(&segments) {
                    let (name, range) = &segments[segment];
                    let mine = own.get(&(name.clone(), range.start)).map_or_else(|| vec![0.0; range.len()], |values| values.to_vec());
                    whole.extend(fetch(piece.owner, mine)?);
                }
                tensors.push((segments[0][segment].0.clone(), whole));
            }
        }
        if self.decision().is_some() {
            tensors.push((LOSSES.to_owned(), self.losses.to_vec()));
        }
        Ok(tensors)
    }

    /// Names of the state tensors that `piece` is part of, with its place in each.
    fn segments(&self, piece: &Piece) -> Vec<(String, std::ops::Range<usize>)> {
        let row = &self.table.rows[piece.parameter];
        let name = |segment: &str| format!("{}.{}.{segment}", row.name, row.rule.name());
        let segments = row.rule.build(&self.config).state_segments(&row.logical_shape);
        let place = |length: usize| if row.rule.is_elementwise() { piece.range.clone() } else { 0..length };
        segments.into_iter().map(|(segment, length)| (name(segment), place(length))).collect()
    }

    /// Replaces the whole state by what [`Optimizer::state_tensors`] once gave, in any order.
    ///
    /// # Errors
    /// A tensor that is missing, twice there, unknown (another rule's, another model's) or of another length; nothing has changed
    /// then.
    pub fn load_state<'a>(&mut self, tensors: impl IntoIterator<Item = (&'a str, &'a [f32])>) -> Result<()> {
        let mut found = BTreeMap::new();
        for (name, values) in tensors {
            if found.insert(name, values).is_some() {
                return Err(Error::input(name, "optimizer state is there twice"));
            }
        }
        let losses = self.decision().map(|_| found.remove(LOSSES).and_then(|values| finch::State::try_from(values).ok()));
        if losses == Some(None) {
            return Err(Error::input(LOSSES, "the smoothed loss is missing").fix(SAME_RECIPE));
        }
        let mut state: Vec<Vec<f32>> = self.state.iter().map(|state| Vec::with_capacity(state.len())).collect();
        let mut own = 0..;
        for pieces in self.pieces.chunk_by(|a, b| a.parameter == b.parameter) {
            let row = &self.table.rows[pieces[0].parameter];
            let lengths = row.rule.build(&self.config).state_segments(&row.logical_shape);
            let names: Vec<String> = self.segments(&pieces[0]).into_iter().map(|(name, _)| name).collect();
            let tensors =
                names.iter().zip(&lengths).map(|(name, (_, length))| take(&mut found, name, *length)).collect::<Result<Vec<_>>>()?;
            for piece in pieces.iter().filter(|piece| piece.owner == self.rank) {
                let at = own.next().expect("endless");
                for ((_, range), values) in self.segments(piece).into_iter().zip(&tensors) {
                    state[at].extend_from_slice(&values[range]);
                }
            }
        }
        if let Some(name) = found.keys().next() {
            return Err(Error::input(name, "optimizer state belongs to no parameter of this run").fix(SAME_RECIPE));
        }
        self.state = state;
        self.losses = losses.flatten().unwrap_or_default();
        Ok(())
    }
}

const DIVERGED: &str = "lower the learning rate, lengthen the warm-up, or look for a fault in the data";
const SAME_RECIPE: &str = "resume with the recipe that wrote the checkpoint, or start a new run from its weights";

/// The tensor called `name`, of which `length` values are expected.
fn take<'a>(found: &mut BTreeMap<&str, &'a [f32]>, name: &str, length: usize) -> Result<&'a [f32]> {
    let Some(values) = found.remove(name) else {
        return Err(Error::input(name, "optimizer state is missing").fix(SAME_RECIPE));
    };
    if values.len() != length {
        let cause = format!("optimizer state has {} values where {length} are expected", values.len());
        return Err(Error::input(name, cause).fix(SAME_RECIPE));
    }
    Ok(values)
}

/// Cuts parameters and gradients at the borders of the `own` pieces, which come in order.
fn cut<'a>(
    own: impl Iterator<Item = (&'a Piece, &'a mut Vec<f32>)>,
    parameters: &'a mut [ParameterSlice<'_>],
    rows: &'a [Assignment],
) -> Vec<Part<'a>> {
    let (mut own, mut parts) = (own.peekable(), vec![]);
    for (index, (slice, row)) in parameters.iter_mut().zip(rows).enumerate() {
        let (mut data, gradient, mut start) = (&mut *slice.data, &*slice.gradient, 0);
        while let Some((piece, state)) = own.next_if(|(piece, _)| piece.parameter == index) {
            let (_, rest) = data.split_at_mut(piece.range.start - start);
            let (mine, rest) = rest.split_at_mut(piece.range.len());
            (data, start) = (rest, piece.range.end);
            let whole = mine.len() == gradient.len();
            let shape = if whole { row.logical_shape.clone() } else { vec![mine.len()] };
            parts.push(Part { parameter: index, row, shape, data: mine, gradient: &gradient[piece.range.clone()], state });
        }
    }
    parts
}

fn movement(before: &[f32], after: &[f32]) -> Movement {
    Movement { change: squared_distance(before, after), size: sum_of_squares(before) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::Role;
    use crate::optim::testing::random;

    fn optimizer(config: &Config) -> Optimizer {
        let parameters = [ParameterInfo::new("embed", [6, 4], Role::Embedding), ParameterInfo::new("w", [4, 4], Role::HiddenMatrix)];
        Optimizer::new(config, &parameters, 10).unwrap()
    }

    struct Run {
        data: [Vec<f32>; 2],
        gradient: [Vec<f32>; 2],
    }

    impl Run {
        fn new() -> Self {
            Self { data: [random(1, 24), random(2, 16)], gradient: [random(3, 24), random(4, 16)] }
        }

        fn slices(&mut self) -> Vec<ParameterSlice<'_>> {
            let pairs = self.data.iter_mut().zip(&mut self.gradient).zip(["embed", "w"]);
            pairs.map(|((data, gradient), name)| ParameterSlice { name, data, gradient }).collect()
        }
    }

    #[test]
    fn every_group_moves_with_the_schedule() {
        let config = Config { weight_decay: 0.0, clip: 0.0, ..Config::default() };
        let moved = |step| {
            let (mut run, start) = (Run::new(), Run::new());
            let report = optimizer(&config).step(step, &mut run.slices()).unwrap();
            let size = |i: usize| movement(&start.data[i], &run.data[i]).ratio();
            [report.learning_rate, size(0), size(1)]
        };
        // Both at full height would give equal moves for the spectral rule; AdamW's correction depends on the step as well.
        let (peak, late) = (moved(5), moved(9));
        let fraction = config.schedule.factor(9, 10);
        assert!(fraction < 0.5 && (late[0] / peak[0] - fraction).abs() < 1e-9);
        assert!((late[2] / peak[2] - fraction).abs() < 1e-3);
        assert!(late[1] / peak[1] < 1.2 * fraction);
    }

    #[test]
    fn clipping_reports_the_norm_before_and_bounds_it_after() {
        let mut run = Run::new();
        let norm = global_norm(run.gradient.iter().map(Vec::as_slice)).norm;
        let report = optimizer(&Config::default()).step(0, &mut run.slices()).unwrap();
        assert!(norm > 1.0 && report.gradient_norm == norm);
        assert!((global_norm(run.gradient.iter().map(Vec::as_slice)).norm - 1.0).abs() < 1e-6);
    }

    #[test]
    fn a_bad_gradient_is_named_and_changes_nothing() {
        let (mut run, start) = (Run::new(), Run::new());
        run.gradient[1][3] = f32::INFINITY;
        let mut optimizer = optimizer(&Config::default());
        let error = optimizer.step(0, &mut run.slices()).unwrap_err();
        assert!(error.to_string().starts_with("w: "), "{error}");
        assert_eq!(run.data, start.data);
        assert_eq!(run.gradient[0], start.gradient[0]);
        assert!(optimizer.state.iter().flatten().all(|&x| x == 0.0));
    }

    #[test]
    fn ratios_are_measured_on_request() {
        let mut run = Run::new();
        let mut optimizer = optimizer(&Config::default());
        assert!(optimizer.step(0, &mut run.slices()).unwrap().movements.is_empty());
        let before = run.data.clone();
        let movements = optimizer.step_measured(1, &mut run.slices()).unwrap().movements;
        assert_eq!(movements, [movement(&before[0], &run.data[0]), movement(&before[1], &run.data[1])]);
        assert!(movements.iter().all(|movement| (1e-5..0.1).contains(&movement.ratio())), "{movements:?}");
    }

    /// Ranks that update their own pieces and share them do what one process does, and their state goes from one number of ranks to another.
    #[test]
    fn ranks_together_are_one_optimizer() {
        let parameters = [ParameterInfo::new("embed", [6, 4], Role::Embedding), ParameterInfo::new("w", [4, 4], Role::HiddenMatrix)];
        let config = Config::default();
        let mut alone = Run::new();
        let mut one = optimizer(&config);
        let mut ranks: Vec<Optimizer> = (0..2).map(|rank| Optimizer::for_rank(&config, &parameters, 10, rank, 2).unwrap()).collect();
        let mut shared = Run::new();
        for step in 0..3 {
            alone.gradient = [random(3 + step, 24), random(40 + step, 16)];
            one.step(step, &mut alone.slices()).unwrap();
            let before = shared.data.clone();
            for optimizer in &mut ranks {
                let mut copy = Run { data: before.clone(), gradient: [random(3 + step, 24), random(40 + step, 16)] };
                optimizer.step(step, &mut copy.slices()).unwrap();
                for piece in optimizer.own() {
                    shared.data[piece.parameter][piece.range.clone()].copy_from_slice(&copy.data[piece.parameter][piece.range.clone()]);
                }
            }
            assert_eq!(shared.data, alone.data);
        }
        assert_eq!(ranks.iter().map(Optimizer::state_bytes).sum::<usize>(), one.state_bytes());
        let expected: Vec<(String, Vec<f32>)> = one.state_tensors().map(|(name, values)| (name, values.to_vec())).collect();
        // Fetching from the owner is played by asking the other optimizer.
        let answers = |rank: usize| {
            let mut all = vec![];
            ranks[rank]
                .whole_state(|owner, values| {
                    all.push((owner, values.clone()));
                    Ok(values)
                })
                .unwrap();
            all
        };
        let by_rank = [answers(0), answers(1)];
        let mut at = 0..;
        let whole = ranks[0].whole_state(|owner, _| Ok(by_rank[owner][at.next().unwrap()].1.clone())).unwrap();
        assert_eq!(whole, expected);
        let mut again = Optimizer::for_rank(&config, &parameters, 10, 1, 3).unwrap();
        again.load_state(whole.iter().map(|(name, values)| (name.as_str(), values.as_slice()))).unwrap();
        for (piece, state) in again.own().zip(&again.state) {
            let whole_row = one.own().zip(&one.state).find(|(other, _)| other.parameter == piece.parameter).unwrap().1;
            assert_eq!(state[..piece.range.len()], whole_row[piece.range.clone()]);
        }
    }

    /// Every rule moves by what the loss-adaptive rate says, and a resumed run goes on as if it had never stopped.
    #[test]
    fn a_rate_that_follows_the_loss_works_with_every_rule_and_resumes() {
        let losses = [4.0, 3.0, 0.09, 0.01, 2.0, 5.0];
        for rule in RuleName::ALL {
            let config = Config { rule, schedule: Schedule::Finch(crate::optim::Finch::default()), ..Config::default() };
            let step = |optimizer: &mut Optimizer, run: &mut Run, at: usize| {
                optimizer.observe(losses[at]);
                run.gradient = Run::new().gradient;
                optimizer.step(at as u64, &mut run.slices()).unwrap()
            };
            let (mut run, mut whole) = (Run::new(), optimizer(&config));
            let reports: Vec<StepReport> = (0..6).map(|at| step(&mut whole, &mut run, at)).collect();
            assert!((reports[0].learning_rate - config.learning_rate / 2.0).abs() < 1e-9, "{rule:?}");
            assert!(reports[2].learning_rate > reports[0].learning_rate && reports.iter().all(|report| report.decision.is_some()));

            let (mut again, mut first) = (Run::new(), optimizer(&config));
            (0..3).for_each(|at| drop(step(&mut first, &mut again, at)));
            let saved: Vec<(String, Vec<f32>)> = first.state_tensors().map(|(name, values)| (name, values.to_vec())).collect();
            let mut second = optimizer(&config);
            second.load_state(saved.iter().map(|(name, values)| (name.as_str(), values.as_slice()))).unwrap();
            let later: Vec<StepReport> = (3..6).map(|at| step(&mut second, &mut again, at)).collect();
            assert_eq!((later, again.data), (reports[3..].to_vec(), run.data), "{rule:?}");
            let without = saved.iter().filter(|(name, _)| name != LOSSES).map(|(name, values)| (name.as_str(), values.as_slice()));
            assert!(second.load_state(without).unwrap_err().to_string().contains("smoothed loss is missing"));
        }
    }

    #[test]
    #[should_panic(expected = "order of the parameters")]
    fn parameters_out_of_order_are_a_bug() {
        let mut run = Run::new();
        let mut slices = run.slices();
        slices.reverse();
        let _ = optimizer(&Config::default()).step(0, &mut slices);
    }

    #[test]
    fn state_of_another_run_is_refused() {
        let saved = optimizer(&Config { rule: RuleName::Lion, ..Config::default() });
        let tensors: Vec<(String, Vec<f32>)> = saved.state_tensors().map(|(name, values)| (name, values.to_vec())).collect();
        let names: Vec<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["embed.adamw.first_moment", "embed.adamw.second_moment", "w.lion.momentum"]);

        let all = |tensors: &[(String, Vec<f32>)], rule| {
            let pairs = tensors.iter().map(|(name, values)| (name.as_str(), values.as_slice()));
            optimizer(&Config { rule, ..Config::default() }).load_state(pairs).map_err(|error| error.to_string())
        };
        assert_eq!(all(&tensors, RuleName::Lion), Ok(()));
        assert_eq!(all(&tensors, RuleName::Muon), Err("w.muon.momentum: optimizer state is missing".to_owned()));
        assert!(all(&tensors[1..], RuleName::Lion).unwrap_err().contains("missing"));
        let mut changed = tensors.clone();
        changed.push(tensors[0].clone());
        assert!(all(&changed, RuleName::Lion).unwrap_err().contains("twice"));
        changed[3].0 = "other".to_owned();
        assert!(all(&changed, RuleName::Lion).unwrap_err().contains("belongs to no parameter"));
        changed.pop();
        changed[2].1.pop();
        assert!(all(&changed, RuleName::Lion).unwrap_err().contains("15 values where 16"));
    }
}
