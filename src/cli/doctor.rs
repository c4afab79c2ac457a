//! `osprey doctor`.

mod baseline;
mod gpu;

use super::arguments::Doctor;
use super::printer::Printer;
use super::{Status, start_threads, write_json};
use crate::error::Result;
use crate::model::{Config, Decoder, Face, GradientBuffers, init::initialize};
use crate::ops::cpu::isa::{Isa, isa};
use crate::ops::host::host;
use crate::train::{dist, step};
use gpu::Presence;
use serde::Serialize;
use std::sync::Arc;

/// Largest distance between fused and reference gradients that rounding explains.
const TOLERANCE: f64 = 1e-4;
/// The same for ternary faces, where a difference in the last bit can move an activation to the next of its 255 codes.
const TERNARY_TOLERANCE: f64 = 2e-2;

#[derive(Serialize)]
struct Findings {
    version: &'static str,
    cores: usize,
    instruction_path: String,
    instruction_path_supported: String,
    cuda: String,
    /// The NVIDIA driver, where there is one.
    driver: Option<String>,
    nccl: bool,
    mpi: bool,
    agreements: Vec<Agreement>,
    gpu: Option<Box<gpu::Findings>>,
}

#[derive(Serialize)]
struct Agreement {
    face: &'static str,
    loss_difference: f64,
    gradient_difference: f64,
    tolerance: f64,
}

impl Agreement {
    fn is_sound(&self) -> bool {
        self.gradient_difference < self.tolerance
    }
}

/// Says what this machine has and runs every fused operation against its reference, inside small models of each face.
pub(super) fn run(command: &Doctor, printer: &Printer) -> Result<Status> {
    start_threads(None)?;
    let faces = [("dense", Face::Dense), ("osp", Face::Osp), ("bitnet", Face::Bitnet)];
    let agreements = faces.into_iter().map(|(name, face)| agreement(name, face)).collect::<Result<Vec<_>>>()?;
    let (cuda, gpu) = match gpu::examine_first(command.checks_only, printer)? {
        Presence::Found(found) => ("built in".to_owned(), Some(found)),
        Presence::Absent(reason) if cfg!(feature = "cuda") => (format!("built in; {reason}"), None),
        Presence::Absent(_) => ("not built in (cargo build --release --features cuda)".to_owned(), None),
    };
    let findings = Findings {
        version: env!("CARGO_PKG_VERSION"),
        cores: rayon::current_num_threads(),
        instruction_path: isa().to_string(),
        instruction_path_supported: Isa::supported().to_string(),
        cuda,
        driver: gpu::driver(),
        nccl: gpu::has_library(&[c"libnccl.so.2", c"libnccl.so"]),
        mpi: gpu::has_library(&[c"libmpi.so", c"libmpi.so.40", c"libmpi.so.12"]),
        agreements,
        gpu,
    };
    write_json(command.report.json.as_deref(), &findings)?;
    printer.data(format!("osprey            {}", findings.version))?;
    printer.data(format!("threads           {}", findings.cores))?;
    printer.data(format!("instruction path  {} (this CPU has {})", findings.instruction_path, findings.instruction_path_supported))?;
    printer.data(format!("CUDA              {}", findings.cuda))?;
    printer.data(format!("NVIDIA driver     {}", findings.driver.as_deref().unwrap_or("none")))?;
    for (name, built_in) in dist::engines() {
        let found = if name == "NCCL" { findings.nccl } else { findings.mpi };
        let (here, engine) = (if found { "found" } else { "not found" }, if built_in { "built in" } else { "not built in" });
        printer.data(format!("{name:<18}{here}, its engine for ranks is {engine}"))?;
    }
    let row = |one: &Agreement| {
        let verdict = if one.is_sound() { "ok" } else { "WRONG" };
        vec![one.face.to_owned(), format!("{:.1e}", one.loss_difference), format!("{:.1e}", one.gradient_difference), verdict.to_owned()]
    };
    let rows: Vec<_> = findings.agreements.iter().map(row).collect();
    printer.table(&["fused against reference", "loss", "gradients", ""], &rows)?;
    if let Some(found) = &findings.gpu {
        gpu::show(found, printer)?;
    }
    let sound = findings.agreements.iter().all(Agreement::is_sound) && findings.gpu.as_ref().is_none_or(|found| found.is_sound());
    Ok(if sound { Status::Done } else { Status::FellShort })
}

/// Relative distances between the two paths' losses and gradients on one batch.
fn agreement(name: &'static str, face: Face) -> Result<Agreement> {
    let config: Config = small(face);
    let decoder = Decoder::new(config.resolve(64)?, false);
    let parameters = initialize(decoder.spec(), 1, &candle_core::Device::Cpu)?;
    let batch = Arc::new(batch(decoder.spec().context));
    let pass = |reference: bool| -> Result<(f64, Vec<f32>)> {
        let mut gradients = GradientBuffers::new(&parameters)?;
        let loss = step::gradients(&decoder, &parameters, std::slice::from_ref(&batch), 1e-4, reference, &mut gradients)?;
        let values = host(gradients.flat())?.to_vec();
        Ok((loss, values))
    };
    let ((fused_loss, fused), (loss, reference)) = (pass(false)?, pass(true)?);
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut fused.iter().zip(&reference).map(|(a, b)| f64::from(a - b)));
    let size = norm(&mut reference.iter().map(|&x| f64::from(x)));
    let tolerance = if face == Face::Bitnet { TERNARY_TOLERANCE } else { TOLERANCE };
    Ok(Agreement { face: name, loss_difference: (fused_loss - loss).abs() / loss, gradient_difference: difference / size, tolerance })
}

fn small(face: Face) -> Config {
    Config { face, dim: 64, layers: 2, heads: 4, kv_heads: Some(2), context: 96, qk_norm: Some(true), ..Config::default() }
}

/// Two rows of two documents each.
fn batch(context: usize) -> crate::data::Batch {
    let mut batch = crate::data::Batch::padding(2, context);
    for at in 0..2 * context {
        let (column, half) = (at % context, context / 2);
        let start = if column < half { 0 } else { half };
        batch.inputs[at] = (at * 7 % 61) as u32;
        batch.targets[at] = (at * 11 % 64) as u32;
        batch.weights[at] = if at % 5 == 0 { 0.0 } else { 1.0 };
        batch.document_starts[at] = start as u32;
        batch.positions[at] = (column - start) as u32;
    }
    batch
}
