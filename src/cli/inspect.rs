//! `osprey inspect`.

use super::arguments::Inspect;
use super::chart::{Panel, Series, ascii, svg};
use super::printer::Printer;
use super::{Status, write_json};
use crate::checkpoint;
use crate::data::shard::Shard;
use crate::error::Result;
use crate::export::import::load_any;
use crate::ops::host::host;
use crate::train::metrics::{Record, read};
use serde::Serialize;
use std::path::Path;

/// Shows what `path` is: a run, a token shard, or a model.
pub(super) fn run(command: &Inspect, printer: &Printer) -> Result<Status> {
    let path = &command.path;
    if path.join("metrics.jsonl").is_file() {
        return inspect_run(command, printer);
    }
    if path.extension().is_some_and(|extension| extension == Shard::ENDING) {
        return inspect_shard(command, printer);
    }
    inspect_model(command, printer)
}

#[derive(Serialize)]
struct RunSummary {
    steps: u64,
    loss: Option<f64>,
    val_loss: Option<f64>,
    val_loss_quantized: Option<f64>,
    kurtosis_mean: Option<f64>,
    checkpoints: Vec<u64>,
    picture: std::path::PathBuf,
}

fn inspect_run(command: &Inspect, printer: &Printer) -> Result<Status> {
    let records = read(&command.path)?;
    let picture = command.path.join("curves.svg");
    let series = |label: &str, key: &str| Series { name: label.to_owned(), points: points(&records, key) };
    let losses = vec![series("training", "loss"), series("held out", "val_loss"), series("held out, quantized", "val_loss_quantized")];
    let kurtosis = vec![series("mean over layers", "kurtosis_mean")];
    let panels = [
        Panel { title: "loss".into(), unit: "nats per token".into(), log: false, series: losses },
        Panel { title: "excess kurtosis of the residual stream".into(), unit: "excess kurtosis".into(), log: true, series: kurtosis },
    ];
    svg(&picture, &command.path.display().to_string(), &panels)?;
    let last = |key: &str| points(&records, key).last().map(|&(_, value)| value);
    let summary = RunSummary {
        steps: records.iter().map(Record::step).max().unwrap_or(0),
        loss: last("loss"),
        val_loss: last("val_loss"),
        val_loss_quantized: last("val_loss_quantized"),
        kurtosis_mean: last("kurtosis_mean"),
        checkpoints: checkpoint::list(&command.path)?.into_iter().map(|(step, _)| step).collect(),
        picture,
    };
    write_json(command.report.json.as_deref(), &summary)?;
    let training: Vec<f64> = points(&records, "loss").into_iter().map(|(_, loss)| loss).collect();
    printer.data(ascii(&training, 72, 12))?;
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.4}"));
    printer.data(format!("steps {}  loss {}  held out {}", summary.steps, number(summary.loss), number(summary.val_loss)))?;
    printer.data(format!("quantized {}  kurtosis {}", number(summary.val_loss_quantized), number(summary.kurtosis_mean)))?;
    printer.data(format!("checkpoints {:?}", summary.checkpoints))?;
    printer.data(format!("picture {}", summary.picture.display()))?;
    Ok(Status::Done)
}

fn points(records: &[Record], key: &str) -> Vec<(f64, f64)> {
    records.iter().filter_map(|record| Some((record.step() as f64, record.number(key)?))).collect()
}

fn inspect_shard(command: &Inspect, printer: &Printer) -> Result<Status> {
    let shard = Shard::open(&command.path)?;
    printer.data(format!("token shard: {} tokens in {} documents", shard.tokens(), shard.documents()))?;
    printer.data(format!("{:?}", shard.header()))?;
    Ok(Status::Done)
}

#[derive(Serialize)]
struct TensorSummary {
    name: String,
    format: String,
    shape: Vec<usize>,
    deviation: f64,
    largest: f64,
    /// Largest magnitude over the root mean square: how far the worst outlier stands out.
    largest_ratio: f64,
    kurtosis: f64,
}

fn inspect_model(command: &Inspect, printer: &Printer) -> Result<Status> {
    let loaded = load_any(&command.path)?;
    let tensors = loaded
        .parameters
        .iter()
        .map(|(name, parameter)| {
            let value = parameter.to_tensor()?;
            let shape = value.dims().to_vec();
            let found = host(&value)?;
            Ok(summary(name, parameter.format.layout().name, shape, &found))
        })
        .collect::<Result<Vec<_>>>()?;
    let adapter = loaded.adapter.iter().flat_map(|adapter| &adapter.modules).flat_map(|(module, part)| {
        let (inputs, outputs) = (part.a.len() / part.rank, part.b.len() / part.rank);
        let a = summary(&format!("{module}.lora_A.weight"), "f32", vec![part.rank, inputs], &part.a);
        [a, summary(&format!("{module}.lora_B.weight"), "f32", vec![outputs, part.rank], &part.b)]
    });
    let tensors: Vec<TensorSummary> = adapter.chain(tensors).collect();
    write_json(command.report.json.as_deref(), &tensors)?;
    printer.data(format!("{} with {} parameters", describe(&command.path), crate::model::flops::parameters(&loaded.spec)))?;
    if let Some(adapter) = &loaded.adapter {
        printer.data(format!("an adapter of {} modules beside its base, {} bytes", adapter.modules.len(), adapter.bytes()))?;
    }
    printer.data(format!("{:#?}", loaded.spec))?;
    let row = |t: &TensorSummary| {
        let numbers = [t.deviation, t.largest, t.largest_ratio, t.kurtosis].map(|value| format!("{value:.3}"));
        let mut row = vec![t.name.clone(), t.format.clone(), format!("{:?}", t.shape)];
        row.extend(numbers);
        row
    };
    let headers = ["tensor", "format", "shape", "deviation", "largest", "largest/rms", "kurtosis"];
    printer.table(&headers, &tensors.iter().map(row).collect::<Vec<_>>())?;
    Ok(Status::Done)
}

fn describe(path: &Path) -> String {
    let kind = if path.is_dir() { "model directory" } else { "model file" };
    format!("{kind} {}", path.display())
}

fn summary(name: &str, format: &str, shape: Vec<usize>, values: &[f32]) -> TensorSummary {
    let n = values.len().max(1) as f64;
    let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
    let moment = |power: i32| values.iter().map(|&x| (f64::from(x) - mean).powi(power)).sum::<f64>() / n;
    let (variance, fourth) = (moment(2), moment(4));
    let largest = values.iter().fold(0.0f64, |most, &x| most.max(f64::from(x.abs())));
    let root_mean_square = (variance + mean * mean).sqrt();
    TensorSummary {
        name: name.to_owned(),
        format: format.to_owned(),
        shape,
        deviation: variance.sqrt(),
        largest,
        largest_ratio: if root_mean_square > 0.0 { largest / root_mean_square } else { 0.0 },
        kurtosis: if variance > 0.0 { fourth / (variance * variance) - 3.0 } else { 0.0 },
    }
}
