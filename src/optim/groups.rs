//! Which parameter gets which rule: by the role the model gives it, never by its name or shape.
//! Hidden matrices get the configured rule; embedding, head and gains get AdamW (Jordan et al. 2024; arXiv:2502.16982).

use std::collections::BTreeSet;
use std::fmt;

use super::{Config, RuleName, elements};
use crate::error::{Error, Result};

/// What a parameter does in the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// The token table; also a table that is the head at the same time, which is listed once.
    Embedding,
    /// The output projection.
    Head,
    /// Gains and other vectors or scalars.
    Gain,
    /// A matrix between two hidden representations, embedding projections included.
    HiddenMatrix,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Head => "head",
            Self::Gain => "gain",
            Self::HiddenMatrix => "hidden matrix",
        }
    }
}

/// A trainable parameter as the model describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct ParameterInfo {
    pub name: String,
    /// Matrices are `[out, in]`; dimensions before those two count independent matrices.
    pub shape: Vec<usize>,
    pub role: Role,
    /// Into how many equal parts the rows fall that are matrices of their own (heads of a query, key or value projection).
    pub blocks: usize,
    /// Its learning rate over that of its group.
    pub rate: f64,
}

impl ParameterInfo {
    /// A parameter that is one block.
    pub fn new(name: impl Into<String>, shape: impl Into<Vec<usize>>, role: Role) -> Self {
        Self { name: name.into(), shape: shape.into(), role, blocks: 1, rate: 1.0 }
    }

    /// The same with its rows in `blocks` parts, which `optim.spectral.split_heads` makes independent.
    #[must_use]
    pub fn with_blocks(self, blocks: usize) -> Self {
        Self { blocks, ..self }
    }

    /// The same with a learning rate of its own, `rate` times that of its group.
    #[must_use]
    pub fn with_rate(self, rate: f64) -> Self {
        Self { rate, ..self }
    }
}

/// One row of the [`Table`].
#[derive(Clone, Debug, PartialEq)]
pub struct Assignment {
    pub name: String,
    pub shape: Vec<usize>,
    /// The shape the rule sees: blocks are a leading dimension.
    pub logical_shape: Vec<usize>,
    pub role: Role,
    pub rule: RuleName,
    /// The group's peak rate over `optim.learning_rate`.
    pub learning_rate_ratio: f64,
    pub weight_decay: f64,
    pub state_bytes: usize,
}

/// Every parameter with its rule, in the order given.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    pub rows: Vec<Assignment>,
}

impl Table {
    /// Assigns each parameter to exactly one rule.
    ///
    /// # Errors
    /// A parameter that is listed twice, is empty, or whose shape does not fit its role.
    pub fn new(config: &Config, parameters: &[ParameterInfo]) -> Result<Self> {
        let mut claimed = BTreeSet::new();
        let mut rows = Vec::with_capacity(parameters.len());
        for parameter in parameters {
            if !claimed.insert(parameter.name.as_str()) {
                let error = Error::input(&parameter.name, "is listed twice, so two rules would update it");
                return Err(error.fix("list a tied parameter once"));
            }
            rows.push(assign(config, parameter)?);
        }
        Ok(Self { rows })
    }
}

fn assign(config: &Config, parameter: &ParameterInfo) -> Result<Assignment> {
    let adamw_ratio = config.adamw_learning_rate.map_or(1.0, |rate| rate / config.learning_rate);
    let (rule, learning_rate_ratio, weight_decay) = match parameter.role {
        Role::Embedding => (RuleName::Adamw, adamw_ratio, config.embedding_weight_decay),
        Role::Head => (RuleName::Adamw, adamw_ratio, config.weight_decay),
        Role::Gain => (RuleName::Adamw, adamw_ratio, 0.0),
        Role::HiddenMatrix => (config.rule, 1.0, config.weight_decay),
    };
    let logical_shape = logical_shape(config, parameter)?;
    Ok(Assignment {
        name: parameter.name.clone(),
        shape: parameter.shape.clone(),
        role: parameter.role,
        rule,
        learning_rate_ratio: learning_rate_ratio * parameter.rate,
        weight_decay,
        state_bytes: size_of::<f32>() * rule.build(config).state_len(&logical_shape),
        logical_shape,
    })
}

fn logical_shape(config: &Config, parameter: &ParameterInfo) -> Result<Vec<usize>> {
    let refuse = |cause: String| Err(Error::input(&parameter.name, cause));
    let shape = &parameter.shape;
    if elements(shape) == 0 {
        return refuse(format!("shape {shape:?} holds nothing to train"));
    }
    if parameter.role != Role::HiddenMatrix {
        return Ok(shape.clone());
    }
    let [leading @ .., rows, cols] = shape.as_slice() else {
        return refuse(format!("shape {shape:?} is not a matrix, which its role needs"));
    };
    if !config.spectral.split_heads || parameter.blocks == 1 {
        return Ok(shape.clone());
    }
    if parameter.blocks == 0 || !rows.is_multiple_of(parameter.blocks) {
        return refuse(format!("{rows} rows do not fall into {} equal blocks", parameter.blocks));
    }
    Ok([leading, &[parameter.blocks, rows / parameter.blocks, *cols]].concat())
}

/// One line per parameter under a heading, then the totals of each rule.
impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<[String; 7]> = self.rows.iter().map(columns).collect();
        let heading = ["parameter", "shape", "role", "rule", "lr x", "decay", "state bytes"].map(str::to_owned);
        let width = |column: usize| lines.iter().chain([&heading]).map(|line| line[column].len()).max().unwrap_or(0);
        let widths: [usize; 7] = std::array::from_fn(width);
        for line in [&heading].into_iter().chain(&lines) {
            for (column, (text, width)) in line.iter().zip(widths).enumerate() {
                // Words to the left, numbers to the right.
                match column {
                    0 => write!(f, "{text:<width$}")?,
                    1..4 => write!(f, "  {text:<width$}")?,
                    _ => write!(f, "  {text:>width$}")?,
                }
            }
            writeln!(f)?;
        }
        self.totals(f)
    }
}

impl Table {
    fn totals(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for rule in RuleName::ALL {
            let rows: Vec<&Assignment> = self.rows.iter().filter(|row| row.rule == rule).collect();
            if !rows.is_empty() {
                let values: usize = rows.iter().map(|row| elements(&row.shape)).sum();
                let bytes: usize = rows.iter().map(|row| row.state_bytes).sum();
                writeln!(f, "{}: {} parameters, {values} values, {bytes} bytes of state", rule.name(), rows.len())?;
            }
        }
        Ok(())
    }
}

fn columns(row: &Assignment) -> [String; 7] {
    let times = |shape: &[usize]| shape.iter().map(usize::to_string).collect::<Vec<_>>().join("x");
    let shape =
        if row.shape == row.logical_shape { times(&row.shape) } else { format!("{} as {}", times(&row.shape), times(&row.logical_shape)) };
    let rate = if row.rule.uses_learning_rate() { row.learning_rate_ratio.to_string() } else { "own".to_owned() };
    let (role, rule) = (row.role.name().to_owned(), row.rule.name().to_owned());
    [row.name.clone(), shape, role, rule, rate, row.weight_decay.to_string(), row.state_bytes.to_string()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters() -> Vec<ParameterInfo> {
        vec![
            ParameterInfo::new("embed", [100, 8], Role::Embedding),
            ParameterInfo::new("q", [8, 8], Role::HiddenMatrix).with_blocks(2),
            ParameterInfo::new("norm", [1], Role::Gain),
            ParameterInfo::new("head", [100, 8], Role::Head),
        ]
    }

    #[test]
    fn roles_choose_rules_rates_and_decay() {
        let config = Config { adamw_learning_rate: Some(5e-4), ..Config::default() };
        let table = Table::new(&config, &parameters()).unwrap();
        let found: Vec<_> = table.rows.iter().map(|row| (row.rule, row.learning_rate_ratio, row.weight_decay, row.state_bytes)).collect();
        let adamw = RuleName::Adamw;
        assert_eq!(found, [(adamw, 0.5, 0.0, 6400), (RuleName::Muon, 1.0, 0.1, 256), (adamw, 0.5, 0.0, 8), (adamw, 0.5, 0.1, 6400)]);
    }

    #[test]
    fn a_parameter_is_claimed_once() {
        let mut twice = parameters();
        twice.push(ParameterInfo::new("embed", [100, 8], Role::Head));
        assert!(Table::new(&Config::default(), &twice).unwrap_err().to_string().starts_with("embed: is listed twice"));
    }

    #[test]
    fn shapes_must_fit_roles() {
        for (shape, blocks) in [(vec![8], 1), (vec![], 1), (vec![0, 8], 1), (vec![9, 8], 2), (vec![8, 8], 0)] {
            let mut config = Config::default();
            config.spectral.split_heads = true;
            let parameter = ParameterInfo::new("w", shape, Role::HiddenMatrix).with_blocks(blocks);
            assert!(Table::new(&config, &[parameter]).unwrap_err().to_string().starts_with("w: "));
        }
    }

    #[test]
    fn heads_are_split_on_request() {
        let mut config = Config::default();
        assert_eq!(Table::new(&config, &parameters()).unwrap().rows[1].logical_shape, [8, 8]);
        config.spectral.split_heads = true;
        assert_eq!(Table::new(&config, &parameters()).unwrap().rows[1].logical_shape, [2, 4, 8]);
    }

    #[test]
    fn the_table_reads_well() {
        let text = Table::new(&Config::default(), &parameters()).unwrap().to_string();
        let expected = "\
parameter  shape  role           rule   lr x  decay  state bytes
embed      100x8  embedding      adamw     1      0         6400
q          8x8    hidden matrix  muon      1    0.1          256
norm       1      gain           adamw     1      0            8
head       100x8  head           adamw     1    0.1         6400
adamw: 3 parameters, 1601 values, 12808 bytes of state
muon: 1 parameters, 64 values, 256 bytes of state
";
        assert_eq!(text, expected);
    }
}
