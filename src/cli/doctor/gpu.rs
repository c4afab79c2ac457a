//! What `osprey doctor` finds out about a GPU: what it is, every kernel against its CPU reference, and how fast each is beside a copy and
//! beside PyTorch.

use super::super::printer::Printer;
use super::baseline::{self, Baseline};
use crate::error::Result;
use crate::ops::cuda::bench::{Measurement, Sizes, measure};
use crate::ops::cuda::check::{Agreement, AttentionCase, LARGE, SMALL, attention_kernels, model_kernels};
use crate::ops::cuda::{Cuda, Device};
use serde::Serialize;
use std::ffi::CStr;

/// One device.
#[derive(Serialize)]
pub(super) struct Findings {
    device: String,
    multiprocessors: u32,
    memory_bytes: usize,
    free_bytes: usize,
    agreements: Vec<Agreement>,
    /// Empty where a kernel is wrong: nobody wants to know how fast.
    speeds: Vec<Measurement>,
    /// One token's attention over FP16 caches.
    pytorch: Baseline,
    /// What ended the examination before its time.
    failure: Option<String>,
}

impl Findings {
    pub(super) fn is_sound(&self) -> bool {
        self.failure.is_none() && self.agreements.iter().all(Agreement::is_sound)
    }

    /// Takes in what a check found; a failure ends all that follows, as a device that failed once stays so.
    fn check(&mut self, what: &str, printer: &Printer, check: impl FnOnce() -> Result<Vec<Agreement>>) {
        if self.failure.is_some() {
            return;
        }
        printer.note(format!("checking {what}"));
        match check() {
            Ok(found) => found.into_iter().for_each(|one| match self.agreements.iter_mut().find(|known| known.kernel == one.kernel) {
                Some(known) => known.merge(&one),
                None => self.agreements.push(one),
            }),
            Err(error) => self.failure = Some(format!("{what}: {error}")),
        }
    }
}

/// What to examine, and how far.
struct Examination<'a> {
    cases: &'a [AttentionCase],
    /// Nothing is timed when absent.
    sizes: Option<&'a Sizes>,
}

/// What is known of GPUs here.
pub(super) enum Presence {
    Found(Box<Findings>),
    /// None, or none that can be used: the reason.
    Absent(String),
}

/// Examines the first GPU, when there is one; without timing anything where only checks are asked for.
pub(super) fn examine_first(checks_only: bool, printer: &Printer) -> Result<Presence> {
    match Cuda::new(0) {
        Ok(device) => {
            let (sizes, cases) = (Sizes::full(), [&SMALL[..], &LARGE].concat());
            let examination = Examination { cases: &cases, sizes: (!checks_only).then_some(&sizes) };
            Ok(Presence::Found(Box::new(examine(&device, &examination, printer, || baseline::measure("python3", &sizes))?)))
        }
        Err(error) => Ok(Presence::Absent(match error.hint() {
            Some(hint) => format!("{error} ({hint})"),
            None => error.to_string(),
        })),
    }
}

fn examine<D: Device>(
    device: &D,
    examination: &Examination<'_>,
    printer: &Printer,
    baseline: impl FnOnce() -> Baseline,
) -> Result<Findings> {
    let (free_bytes, memory_bytes) = device.room()?;
    let mut found = Findings {
        device: device.describe(),
        multiprocessors: device.multiprocessors(),
        memory_bytes,
        free_bytes,
        agreements: vec![],
        speeds: vec![],
        pytorch: Baseline::Absent { absent: "nothing was timed".to_owned() },
        failure: None,
    };
    for (what, check) in model_kernels() {
        found.check(what, printer, || check(device));
    }
    for case @ (shape, tokens) in examination.cases {
        let what = format!("attention of {} heads over {} of width {}, {tokens} tokens", shape.heads(), shape.kv_heads, shape.head_dim);
        found.check(&what, printer, || attention_kernels(device, std::slice::from_ref(case)));
    }
    let Some(sizes) = examination.sizes.filter(|_| found.is_sound()) else { return Ok(found) };
    // Before ours: then the memory is still free.
    printer.note("timing PyTorch");
    found.pytorch = baseline();
    let timed = measure(device, sizes, |one| {
        printer.note(format!("{}, {}: {:.1} us", one.kernel, one.shape, one.microseconds));
        found.speeds.push(one);
    });
    found.failure = timed.err().map(|error| format!("timing: {error}"));
    Ok(found)
}

/// Prints the findings; figures as a table in Markdown.
pub(super) fn show(findings: &Findings, printer: &Printer) -> Result<()> {
    let gigabytes = |bytes: usize| bytes as f64 / 1e9;
    printer.data(format!(
        "GPU               {}, {} multiprocessors, {:.1} GB of which {:.1} free",
        findings.device,
        findings.multiprocessors,
        gigabytes(findings.memory_bytes),
        gigabytes(findings.free_bytes)
    ))?;
    let row = |one: &Agreement| {
        let verdict = if one.is_sound() { "ok" } else { "WRONG" };
        vec![
            one.kernel.to_owned(),
            one.cases.to_string(),
            format!("{:.1e}", one.error),
            format!("{:.1e}", one.tolerance),
            verdict.to_owned(),
        ]
    };
    let rows: Vec<_> = findings.agreements.iter().map(row).collect();
    printer.table(&["kernel against the CPU", "cases", "error", "at most", ""], &rows)?;
    markdown(&findings.speeds).iter().try_for_each(|line| printer.data(line))?;
    if let Some(failure) = &findings.failure {
        printer.data(format!("FAILED            {failure}"))?;
    }
    match &findings.pytorch {
        Baseline::Measured(found) => {
            printer.data(format!("SDPA              PyTorch {} on {}, FP16, the fastest way it has", found.torch, found.device))?
        }
        Baseline::Absent { absent } => printer.data(format!("SDPA              SKIPPED: {absent}"))?,
    }
    decode_markdown(&findings.speeds, &findings.pytorch).iter().try_for_each(|line| printer.data(line))
}

/// The table that goes into the documentation.
fn markdown(speeds: &[Measurement]) -> Vec<String> {
    if speeds.is_empty() {
        return vec![];
    }
    let mut lines =
        vec!["| kernel | size | us | GB/s | TFLOP/s | of copy |".to_owned(), "| --- | --- | --- | --- | --- | --- |".to_owned()];
    lines.extend(speeds.iter().map(|one| {
        let Measurement { kernel, shape, microseconds, gbytes_per_second, tflops, of_copy, .. } = one;
        format!("| {kernel} | {shape} | {microseconds:.1} | {gbytes_per_second:.0} | {tflops:.2} | {:.0}% |", of_copy * 100.0)
    }));
    lines
}

/// One token's attention by context, beside PyTorch's over an FP16 cache.
fn decode_markdown(speeds: &[Measurement], pytorch: &Baseline) -> Vec<String> {
    let mut rows: Vec<(usize, &Measurement)> = speeds.iter().filter_map(|one| Some((one.context?, one))).collect();
    if rows.is_empty() {
        return vec![];
    }
    rows.sort_by_key(|(context, _)| *context);
    let mut lines = vec![
        "| context | cache | us | GB/s | of copy | SDPA, us | faster than SDPA |".to_owned(),
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |".to_owned(),
    ];
    lines.extend(rows.iter().map(|(context, one)| {
        let Measurement { kernel, microseconds, gbytes_per_second, of_copy, .. } = one;
        let cache = kernel.trim_start_matches("decode_attention ");
        let (time, factor) = match pytorch.row(*context) {
            Some(row) => (format!("{:.1} ({})", row.microseconds, row.how), format!("{:.2}x", row.microseconds / microseconds)),
            None => ("-".to_owned(), "-".to_owned()),
        };
        format!("| {context} | {cache} | {microseconds:.1} | {gbytes_per_second:.0} | {:.0}% | {time} | {factor} |", of_copy * 100.0)
    }));
    lines
}

/// The first line of what the NVIDIA driver says of itself.
pub(super) fn driver() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    text.lines().next().map(|line| line.trim_start_matches("NVRM version:").trim().to_owned())
}

/// Whether the system has a shared library that one of these names finds.
pub(super) fn has_library(names: &[&CStr]) -> bool {
    #[cfg(unix)]
    return names.iter().any(|name| {
        // SAFETY: a system library of a well-known name runs its own initializers, as it would when linked; it is closed again.
        unsafe {
            let found = libc::dlopen(name.as_ptr(), libc::RTLD_LAZY | libc::RTLD_LOCAL);
            !found.is_null() && libc::dlclose(found) == 0
        }
    });
    #[cfg(not(unix))]
    return false;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cuda::attention::Shape;
    use crate::ops::cuda::{Emulated, Order};

    #[test]
    fn a_device_is_examined() {
        let Some(device) = Emulated::new() else { return };
        let shape = Shape { kv_heads: 1, group: 2, head_dim: 16 };
        let sizes =
            Sizes { copy_bytes: 1 << 12, outputs: 8, inputs: 64, rows: 64, shape, contexts: vec![128], cold_bytes: 0, seconds: 0.0 };
        let rows = vec![baseline::Row { context: 128, how: "flash".to_owned(), microseconds: 5.0 }];
        let pytorch = || Baseline::Measured(baseline::Measured { torch: "2".to_owned(), device: "G".to_owned(), rows });
        let (device, printer) = (device.in_order(Order::Reverse), Printer::new(true));
        let examination = Examination { cases: &SMALL[..1], sizes: Some(&sizes) };
        let findings = examine(&device, &examination, &printer, pytorch).unwrap();
        assert!(findings.is_sound() && findings.agreements.len() >= 15);
        let table = decode_markdown(&findings.speeds, &findings.pytorch);
        assert!(table.len() == 8 && table[2..].iter().all(|line| line.contains("(flash)") && line.ends_with("x |")), "{table:?}");
        let without = decode_markdown(&findings.speeds, &Baseline::Absent { absent: String::new() });
        assert!(without[2..].iter().all(|line| line.ends_with("| - | - |")));
        let lines = markdown(&findings.speeds);
        assert_eq!(lines.len(), 2 + findings.speeds.len());
        assert!(lines.iter().all(|line| line.matches('|').count() == 7), "{lines:?}");
        assert!(markdown(&[]).is_empty());
    }

    #[test]
    fn a_failure_ends_the_examination_and_is_told() {
        let Some(device) = Emulated::new() else { return };
        let (device, printer) = (device.in_order(Order::Forward), Printer::new(true));
        // Wider than any kernel.
        let cases = [(Shape { kv_heads: 1, group: 1, head_dim: 300 }, 64), SMALL[0]];
        let findings = examine(&device, &Examination { cases: &cases, sizes: None }, &printer, || unreachable!()).unwrap();
        assert!(!findings.is_sound() && findings.failure.unwrap().contains("300"));
        assert!(findings.agreements.len() >= 8 && findings.speeds.is_empty());
    }

    #[test]
    fn libraries_are_looked_for() {
        assert!(!has_library(&[c"libno-such-library-at-all.so"]));
        #[cfg(all(target_os = "linux", target_env = "gnu"))]
        assert!(has_library(&[c"libno-such-library-at-all.so", c"libc.so.6"]));
    }
}
