//! Several processes under a real `mpirun`: they train what one trains, save what any number can resume, and never wait for the dead.
//! Built with `--features mpi`; without `mpirun` the tests say so and pass.

use crate::support::{Ran, Sandbox, TERNARY};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

fn has_mpirun() -> bool {
    let found =
        Command::new("mpirun").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success());
    if !found {
        eprintln!("SKIPPED: there is no mpirun on this machine");
    }
    found
}

fn mpirun(sandbox: &Sandbox, ranks: usize, overrides: &[&str]) -> Command {
    let mut command = Command::new("mpirun");
    command.args(["--allow-run-as-root", "--oversubscribe", "-n", &ranks.to_string(), env!("CARGO_BIN_EXE_osprey"), "train", "tiny.toml"]);
    for one in ["run.threads=1"].iter().chain(overrides) {
        command.args(["--set", one]);
    }
    command.current_dir(sandbox.path("")).stdin(Stdio::null()).env_remove("RUST_BACKTRACE");
    command
}

/// What Osprey itself said, without mpirun's remarks.
fn messages(ran: &Ran) -> Vec<&str> {
    ran.err.lines().filter(|line| line.starts_with("error: ")).collect()
}

#[track_caller]
fn assert_close(one: &[f64], other: &[f64], tolerance: f64) {
    assert_eq!(one.len(), other.len());
    let worst = one.iter().zip(other).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(worst <= tolerance, "losses differ by {worst}");
}

#[test]
fn any_number_of_ranks_trains_the_same_model() {
    if !has_mpirun() {
        return;
    }
    let ternary: Vec<&str> = [&["train.steps=5"], &TERNARY[..]].concat();
    let arms: [(&str, Vec<&str>, f64); 4] = [
        ("muon", vec!["train.steps=100"], 1e-4),
        ("adamw", vec!["train.steps=100", "optim.rule=adamw"], 1e-4),
        ("lion", vec!["train.steps=5", "optim.rule=lion", "optim.learning_rate=1e-4"], 1e-4),
        ("ternary", ternary, 2e-3),
    ];
    for (name, overrides, tolerance) in arms {
        let sandbox = Sandbox::new();
        let with = |dir: &'static str| [&overrides[..], &["train.accumulate=2", "eval.every=0", "checkpoint.every=0", dir]].concat();
        sandbox.train(&[&with("run.dir=one")[..], &["run.threads=1"]].concat()).done();
        for (ranks, dir, run) in [(2, "run.dir=two", "two"), (4, "run.dir=four", "four")] {
            Ran::of(mpirun(&sandbox, ranks, &with(dir))).done();
            eprintln!("{name} over {ranks} ranks");
            assert_close(&sandbox.losses("one"), &sandbox.losses(run), tolerance);
        }
    }
}

#[test]
fn four_ranks_save_what_two_resume() {
    if !has_mpirun() {
        return;
    }
    let sandbox = Sandbox::new();
    sandbox.train(&["run.dir=whole", "run.threads=1"]).done();
    Ran::of(mpirun(&sandbox, 4, &[])).done();
    // As if they had ended after step 4.
    std::fs::remove_dir_all(sandbox.path("run/step-000008")).unwrap();
    let resumed = Ran::of(mpirun(&sandbox, 2, &[])).done();
    assert!(resumed.err.contains("resuming from run/step-000004"), "{}", resumed.err);
    assert_close(&sandbox.losses("whole"), &sandbox.losses("run"), 1e-4);
    // And back to one process, which finds every tensor it expects.
    std::fs::remove_dir_all(sandbox.path("run/step-000008")).unwrap();
    sandbox.train(&["run.threads=1"]).done();
    assert_close(&sandbox.losses("whole"), &sandbox.losses("run"), 1e-4);
}

#[test]
fn the_first_bucket_travels_while_the_backward_pass_computes() {
    if !has_mpirun() {
        return;
    }
    let sandbox = Sandbox::new();
    let mut command = mpirun(&sandbox, 2, &["train.steps=3", "model.dim=256", "model.layers=4", "model.context=128"]);
    command.env("OSPREY_TRACE", sandbox.path("trace"));
    Ran::of(command).done();
    let trace: serde_json::Value = serde_json::from_slice(&sandbox.read("trace.rank-0.json")).unwrap();
    let spans = trace["traceEvents"].as_array().unwrap();
    let number = |span: &serde_json::Value, key: &str| span[key].as_u64().unwrap();
    let backward = spans.iter().rfind(|span| span["name"] == "backward").unwrap();
    let (begin, end) = (number(backward, "ts"), number(backward, "ts") + number(backward, "dur"));
    let inside = spans.iter().filter(|span| {
        span["name"].as_str().is_some_and(|name| name.starts_with("gradients")) && (begin..end).contains(&number(span, "ts"))
    });
    let done = inside.clone().filter(|span| number(span, "ts") + number(span, "dur") < end).count();
    assert!(done >= 1, "{} buckets began and {done} were through before the backward pass ended", inside.count());
}

struct Running {
    child: Child,
    started: Instant,
}

impl Running {
    /// Two ranks that would train for minutes, once they have saved something.
    fn start(sandbox: &Sandbox) -> Self {
        let mut command = mpirun(sandbox, 2, &["train.steps=100000", "checkpoint.every=5", "eval.every=0", "checkpoint.keep_last=2"]);
        let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let started = Instant::now();
        while !sandbox.path("run/step-000010").exists() {
            assert!(started.elapsed() < Duration::from_secs(120), "no checkpoint");
            std::thread::sleep(Duration::from_millis(20));
        }
        Self { child, started: Instant::now() }
    }

    /// The process that is rank `rank` of this run.
    fn process(&self, sandbox: &Sandbox, rank: usize) -> i32 {
        let wanted = format!("OMPI_COMM_WORLD_RANK={rank}");
        let here = sandbox.path("").canonicalize().unwrap();
        let entries = std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
        let is_it = |pid: &i32| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            let place = std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
            place == here && environment.split(|&byte| byte == 0).any(|variable| variable == wanted.as_bytes())
        };
        entries.filter(is_it).min().expect("the rank runs")
    }

    fn signal(&self, pid: i32, signal: &str) {
        assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
    }

    /// Waits for the end, which must come within 30 s of `since`, and returns what was said.
    fn ended(mut self, since: Instant) -> String {
        while self.child.try_wait().unwrap().is_none() {
            if since.elapsed() > Duration::from_secs(30) {
                let _ = self.child.kill();
                panic!("the others still wait 30 s later, {} s after the start", self.started.elapsed().as_secs());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let output = self.child.wait_with_output().unwrap();
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    }
}

#[track_caller]
fn assert_blamed(sandbox: &Sandbox, said: &str, rank: usize) {
    let blame = said.lines().find(|line| line.starts_with("error: ")).unwrap_or_else(|| panic!("no error in\n{said}"));
    assert!(blame.starts_with(&format!("error: rank {rank}: ")) && blame.contains("did not reach collective"), "{blame}");
    // What was saved last is whole: one process goes on from it.
    let newest = osprey::checkpoint::latest(&sandbox.path("run")).unwrap();
    assert!(newest.rejected.is_empty());
    let step = newest.checkpoint.unwrap().step();
    assert!(step >= 10);
    let steps = format!("train.steps={}", step + 1);
    sandbox.train(&[&steps, "run.threads=1", "checkpoint.every=0", "eval.every=0"]).done();
}

#[test]
fn a_killed_rank_ends_the_run_at_once() {
    if !has_mpirun() {
        return;
    }
    for rank in [1, 0] {
        let sandbox = Sandbox::new();
        let running = Running::start(&sandbox);
        running.signal(running.process(&sandbox, rank), "-KILL");
        let said = running.ended(Instant::now());
        assert_blamed(&sandbox, &said, rank);
    }
}

#[test]
fn a_stopped_rank_ends_the_run_within_half_a_minute() {
    if !has_mpirun() {
        return;
    }
    for rank in [1, 0] {
        let sandbox = Sandbox::new();
        let running = Running::start(&sandbox);
        running.signal(running.process(&sandbox, rank), "-STOP");
        let said = running.ended(Instant::now());
        assert_blamed(&sandbox, &said, rank);
    }
}

#[test]
fn a_signal_to_all_ranks_saves_and_ends_in_order() {
    if !has_mpirun() {
        return;
    }
    let sandbox = Sandbox::new();
    let running = Running::start(&sandbox);
    let before = osprey::checkpoint::latest(&sandbox.path("run")).unwrap().checkpoint.unwrap().step();
    for rank in [0, 1] {
        running.signal(running.process(&sandbox, rank), "-TERM");
    }
    let mut child = running.child;
    let since = Instant::now();
    while child.try_wait().unwrap().is_none() {
        assert!(since.elapsed() < Duration::from_secs(30), "still running");
        std::thread::sleep(Duration::from_millis(50));
    }
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let after = osprey::checkpoint::latest(&sandbox.path("run")).unwrap().checkpoint.unwrap().step();
    assert!(after >= before);
}

#[test]
fn mistakes_are_told_once() {
    if !has_mpirun() {
        return;
    }
    let refused = |command: Command, words: &[&str]| {
        let ran = Ran::of(command);
        assert_eq!(ran.code, Some(2), "{}", ran.err);
        let messages = messages(&ran);
        assert_eq!(messages.len(), 1, "{}", ran.err);
        assert!(words.iter().all(|word| messages[0].contains(word)), "{messages:?}");
    };
    let sandbox = Sandbox::new();
    refused(mpirun(&sandbox, 2, &["train.batch=3"]), &["train.batch", "3 rows do not divide among 2 ranks"]);
    refused(mpirun(&sandbox, 2, &["model.dmi=3"]), &["model.dmi"]);
    refused(mpirun(&sandbox, 2, &["optim.learning_rate=-1"]), &["learning_rate"]);
    let mut mixed = mpirun(&sandbox, 1, &[]);
    mixed.args([":", "-n", "1", env!("CARGO_BIN_EXE_osprey"), "train", "tiny.toml", "--set", "run.threads=1", "--set", "train.steps=9"]);
    refused(mixed, &["rank 1", "another recipe than rank 0"]);
    let mut resume = mpirun(&sandbox, 2, &[]);
    resume.arg("--verify-resume");
    refused(resume, &["one process"]);
}
