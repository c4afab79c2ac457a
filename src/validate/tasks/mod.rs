//! Tasks with choices, scored as lm-evaluation-harness scores them (`multiple_choice`, zero-shot; Gao et al., 2021).
//! A choice's score is the summed log-likelihood of its tokens after its context; `accuracy` takes the largest, `accuracy_normalized` the
//! largest after division by the characters of the choice. Of equal scores the first counts. stderr = sqrt(p (1 - p) / (n - 1)).
//! Context and choice are encoded together, with BOS in front where the tokenizer has one; tokens past those of the context alone are the
//! choice's. What is longer than the model's context loses its beginning.

mod questions;

use super::evaluate::ROWS;
use super::rows::log_sum_exp;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::infer::cache::Options;
use crate::infer::sampler::argmax;
use crate::infer::{Engine, Session};
use serde::Serialize;
use std::path::Path;

pub use questions::{Choice, Question, read};

/// How a model did on one task.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct TaskScore {
    /// Share of questions where the right choice has the largest summed log-likelihood.
    pub accuracy: f64,
    /// The same by log-likelihood per character; where there is one choice, `accuracy` again.
    pub accuracy_normalized: f64,
    /// Of `accuracy`.
    pub stderr: f64,
    /// Of `accuracy_normalized`.
    pub stderr_normalized: f64,
    /// Mean log-likelihood of the right choices, in nats.
    pub gold_log_likelihood: f64,
    /// Questions.
    pub n: usize,
    /// Choices that lost their beginning to the context.
    pub cut: usize,
}

/// How likely a choice is.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Likelihood {
    /// Nats.
    sum: f64,
    /// Whether every token is the likeliest.
    is_greedy: bool,
}

/// Puts the questions of `path`, at most `most`, to `engine`.
///
/// # Errors
/// When the file cannot be read as questions, or a choice is longer than the model's context.
pub fn task(engine: &Engine, path: &Path, most: usize, cache: Options) -> Result<TaskScore> {
    let questions = read(path, most)?;
    score(engine, &questions, cache).map_err(|(line, error)| match error {
        Error::Input { cause, fix, .. } => Error::Input { place: format!("{}:{line}", path.display()), cause, fix },
        other => other,
    })
}

/// Puts `questions` to `engine`; an error comes with the line of the question.
fn score(engine: &Engine, questions: &[Question], cache: Options) -> Result<TaskScore, (usize, Error)> {
    let mut reader = Reader::new(engine, cache).map_err(|error| (0, error))?;
    let (mut right, mut right_normalized, mut gold) = (0, 0, 0.0);
    for question in questions {
        let found: Result<Vec<Likelihood>> = question.choices.iter().map(|choice| reader.likelihood(choice)).collect();
        let found = found.map_err(|error| (question.line, error))?;
        gold += found[question.gold].sum;
        if let [only] = found.as_slice() {
            right += usize::from(only.is_greedy);
            right_normalized += usize::from(only.is_greedy);
            continue;
        }
        let sums: Vec<f64> = found.iter().map(|likelihood| likelihood.sum).collect();
        let normalized: Vec<f64> = sums.iter().zip(&question.choices).map(|(sum, choice)| sum / choice.length.max(1) as f64).collect();
        right += usize::from(largest(&sums) == question.gold);
        right_normalized += usize::from(largest(&normalized) == question.gold);
    }
    let n = questions.len();
    let share = |right: usize| right as f64 / n as f64;
    let error = |share: f64| if n > 1 { (share * (1.0 - share) / (n - 1) as f64).sqrt() } else { 0.0 };
    Ok(TaskScore {
        accuracy: share(right),
        accuracy_normalized: share(right_normalized),
        stderr: error(share(right)),
        stderr_normalized: error(share(right_normalized)),
        gold_log_likelihood: gold / n as f64,
        n,
        cut: reader.cut,
    })
}

/// The place of the first largest score.
fn largest(scores: &[f64]) -> usize {
    (1..scores.len()).fold(0, |best, at| if scores[at] > scores[best] { at } else { best })
}

/// Reads choices on one session; what two choices share at their beginning is read once.
struct Reader<'e> {
    engine: &'e Engine,
    tokenizer: &'e Tokenizer,
    session: Session<'e>,
    /// What the session holds.
    held: Vec<u32>,
    cut: usize,
}

impl<'e> Reader<'e> {
    fn new(engine: &'e Engine, cache: Options) -> Result<Self> {
        let session = Session::new(engine, cache, engine.spec().context)?;
        Ok(Self { engine, tokenizer: engine.tokenizer()?, session, held: Vec::new(), cut: 0 })
    }

    /// The tokens of context and continuation together, and how many of them are the continuation's.
    fn encode(&self, choice: &Choice) -> Result<(Vec<u32>, usize)> {
        // White space at the end of the context belongs to what follows, whose first token usually carries it.
        let context = choice.context.trim_end();
        let whole = format!("{context}{}{}", &choice.context[context.len()..], choice.continuation);
        let before = self.tokenizer.encode(context)?;
        let mut ids: Vec<u32> = self.tokenizer.bos().into_iter().collect();
        ids.extend(self.tokenizer.encode(&whole)?);
        let given = before.len() + usize::from(self.tokenizer.bos().is_some());
        let continuation = ids.len().saturating_sub(given.max(1));
        if continuation == 0 || continuation > self.session.capacity() {
            let cause =
                format!("a choice of {continuation} tokens cannot be scored by a model with a context of {}", self.session.capacity());
            return Err(Error::input("task", cause).fix("remove the question, or use a model with a longer context"));
        }
        Ok((ids, continuation))
    }

    fn likelihood(&mut self, choice: &Choice) -> Result<Likelihood> {
        let (mut ids, continuation) = self.encode(choice)?;
        let most = self.session.capacity() + 1;
        if ids.len() > most {
            self.cut += 1;
            ids.drain(..ids.len() - most);
        }
        let (inputs, targets) = (&ids[..ids.len() - 1], &ids[ids.len() - continuation..]);
        let shared = self.held.iter().zip(inputs).take_while(|(one, two)| one == two).count();
        let kept = shared.min(inputs.len() - continuation);
        self.session.truncate(kept);
        self.held.truncate(kept);
        let hidden = self.session.hidden(&inputs[kept..])?;
        self.held.extend_from_slice(&inputs[kept..]);
        let dim = self.engine.spec().dim;
        let rows = &hidden[(inputs.len() - kept - continuation) * dim..];
        let mut found = Likelihood { sum: 0.0, is_greedy: true };
        for (hidden, targets) in rows.chunks(ROWS * dim).zip(targets.chunks(ROWS)) {
            let logits = self.engine.logits(hidden)?;
            for (row, &target) in logits.chunks(self.engine.spec().vocab).zip(targets) {
                found.sum += f64::from(row.get(target as usize).copied().unwrap_or(f32::NAN)) - log_sum_exp(row);
                found.is_greedy &= argmax(row) == target;
            }
        }
        if found.sum.is_finite() {
            return Ok(found);
        }
        Err(Error::input("model", "gives a likelihood that is not finite")
            .fix("check that the tokenizer belongs to the model and the file is not damaged"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::infer::testing::{Artifact, dense, training_logits, weights};

    fn choice(context: &str, continuation: &str, length: usize) -> Choice {
        Choice { context: context.into(), continuation: continuation.into(), length }
    }

    #[test]
    fn likelihoods_are_those_of_the_training_forward() {
        let spec = dense();
        let masters = weights(&spec, 1);
        let engine = Artifact::checkpoint(&spec, &masters).engine();
        let tokenizer = Tokenizer::byte();
        let mut reader = Reader::new(&engine, Options::default()).unwrap();
        // In any order and whatever was read before: (context, continuation, tokens of the continuation).
        for (context, continuation, tokens) in [("ab", " cd", 3), ("ab", " ce!", 4), ("ab ", "x", 2), ("", " y", 2), ("ab", " cd", 3)] {
            let found = reader.likelihood(&choice(context, continuation, 1)).unwrap();
            let ids: Vec<u32> = tokenizer.bos().into_iter().chain(tokenizer.encode(&format!("{context}{continuation}")).unwrap()).collect();
            let logits = training_logits(&spec, &masters, &ids);
            let expected: f64 = (ids.len() - tokens..ids.len())
                .map(|at| {
                    let row = &logits[(at - 1) * spec.vocab..at * spec.vocab];
                    f64::from(row[ids[at] as usize]) - row.iter().map(|z| f64::from(*z).exp()).sum::<f64>().ln()
                })
                .sum();
            assert!((found.sum - expected).abs() < 1e-4, "{context:?} {continuation:?}: {} {expected}", found.sum);
        }
        assert!(reader.likelihood(&choice(&"a".repeat(300), " b", 1)).is_ok() && reader.cut == 1);
        assert!(reader.likelihood(&choice("a", &"b".repeat(300), 1)).is_err());
    }

    #[test]
    fn scores_follow_from_likelihoods() {
        let spec = dense();
        let engine = Artifact::checkpoint(&spec, &weights(&spec, 1)).engine();
        let mut reader = Reader::new(&engine, Options::default()).unwrap();
        let choices = |lengths: [usize; 3]| {
            ["ab", "c", "defg"].iter().zip(lengths).map(|(text, length)| choice("x", text, length)).collect::<Vec<_>>()
        };
        let sums: Vec<f64> = choices([1; 3]).iter().map(|choice| reader.likelihood(choice).unwrap().sum).collect();
        // Lengths that make the least likely choice the best per character.
        let worst = largest(&sums.iter().map(|sum| -sum).collect::<Vec<_>>());
        let mut lengths = [1; 3];
        lengths[worst] = 1000;
        let question = |gold: usize| Question { choices: choices(lengths), gold, line: 1 };
        let score_of = |questions: &[Question]| score(&engine, questions, Options::default()).unwrap();
        let by_sum = score_of(&[question(largest(&sums))]);
        assert_eq!((by_sum.accuracy, by_sum.accuracy_normalized, by_sum.stderr, by_sum.n), (1.0, 0.0, 0.0, 1));
        let by_length = score_of(&[question(worst)]);
        assert_eq!((by_length.accuracy, by_length.accuracy_normalized), (0.0, 1.0));
        let four = score_of(&[question(largest(&sums)), question(worst), question(largest(&sums)), question(largest(&sums))]);
        // sqrt(0.75 * 0.25 / 3)
        assert!((four.accuracy, four.accuracy_normalized) == (0.75, 0.25) && (four.stderr - 0.25).abs() < 1e-12);
        assert!((by_sum.gold_log_likelihood - sums[largest(&sums)]).abs() < 1e-9);
    }

    #[test]
    fn ties_go_to_the_first() {
        assert_eq!((largest(&[-2.0, -1.0, -1.0]), largest(&[-1.0]), largest(&[-3.0, -3.0])), (1, 0, 0));
    }
}
