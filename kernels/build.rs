//! Compiles `kernels/*.cu` with nvcc into one fatbin each and writes the table of what to embed. Without the feature `cuda` it does
//! nothing. `CUDA_COMPUTE_CAP` (such as 90) limits the architectures to one.

use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::{env, fs, thread};

/// Compiled ahead; the last is also embedded as PTX, which later GPUs compile themselves.
const ARCHITECTURES: [&str; 3] = ["80", "90", "100"];

fn main() {
    println!("cargo::rerun-if-changed=kernels/build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed=kernels");
    for name in ["CUDA_HOME", "CUDA_PATH", "CUDA_COMPUTE_CAP"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo names a folder for what is built"));
    let nvcc = find_nvcc();
    let architectures = architectures(&nvcc);
    let sources = sources();
    let compiled: Vec<Result<(), String>> = thread::scope(|scope| {
        let (nvcc, out, architectures) = (&nvcc, &out, &architectures);
        let jobs: Vec<_> = sources.iter().map(|source| scope.spawn(move || compile(nvcc, source, out, architectures))).collect();
        jobs.into_iter().map(|job| job.join().expect("compiling does not panic")).collect()
    });
    let failures: Vec<String> = compiled.into_iter().filter_map(Result::err).collect();
    if !failures.is_empty() {
        stop(&failures.join("\n"));
    }
    fs::write(out.join("embedded_kernels.rs"), table(&sources, &out)).unwrap_or_else(|error| stop(&format!("{}: {error}", out.display())));
}

/// Ends the build with one message.
fn stop(message: &str) -> ! {
    message.lines().for_each(|line| println!("cargo::error={line}"));
    exit(1)
}

fn find_nvcc() -> PathBuf {
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(PathBuf::from);
    let folders = homes.map(|home| home.join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    let all = folders.chain(env::split_paths(&path)).chain([PathBuf::from("/usr/local/cuda/bin")]);
    all.map(|folder| folder.join("nvcc")).find(|program| program.is_file()).unwrap_or_else(|| {
        stop("the feature cuda needs nvcc of CUDA 12.8 or later: set CUDA_HOME to the toolkit's folder, or build without the feature")
    })
}

/// The architectures asked for, as far as this nvcc knows them.
fn architectures(nvcc: &Path) -> Vec<String> {
    if let Ok(only) = env::var("CUDA_COMPUTE_CAP") {
        return vec![only.replace('.', "")];
    }
    let known = Command::new(nvcc).arg("--list-gpu-code").output().unwrap_or_else(|error| stop(&format!("{}: {error}", nvcc.display())));
    let known = String::from_utf8_lossy(&known.stdout).into_owned();
    let is_known = |architecture: &str| known.lines().any(|line| line.trim() == format!("sm_{architecture}"));
    let found: Vec<String> = ARCHITECTURES.into_iter().filter(|architecture| is_known(architecture)).map(str::to_owned).collect();
    if found.is_empty() {
        stop(&format!("{} compiles for none of sm_80, sm_90 and sm_100", nvcc.display()));
    }
    found
}

fn sources() -> Vec<PathBuf> {
    let entries = fs::read_dir("kernels").expect("the build script runs in the repository").filter_map(Result::ok);
    let mut sources: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "cu")).collect();
    sources.sort();
    sources
}

fn stem(source: &Path) -> String {
    source.file_stem().expect("a source has a name").to_string_lossy().into_owned()
}

fn compile(nvcc: &Path, source: &Path, out: &Path, architectures: &[String]) -> Result<(), String> {
    // as kernels/build.sh and kernels/README.md have it: no fusing of multiplication and addition behind the source's back
    let mut command = Command::new(nvcc);
    command.args(["-std=c++17", "-O3", "-fmad=false", "-fatbin"]);
    for (at, architecture) in architectures.iter().enumerate() {
        let ptx = if at + 1 == architectures.len() { format!(",compute_{architecture}") } else { String::new() };
        command.arg(format!("-gencode=arch=compute_{architecture},code=[sm_{architecture}{ptx}]"));
    }
    command.arg("-o").arg(out.join(stem(source)).with_extension("fatbin")).arg(source);
    let output = command.output().map_err(|error| format!("{}: {error}", nvcc.display()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("nvcc does not compile {}:\n{}", source.display(), String::from_utf8_lossy(&output.stderr)))
}

/// `static EMBEDDED`, as `src/ops/cuda/enabled.rs` includes it.
fn table(sources: &[PathBuf], out: &Path) -> String {
    let mut text = String::from("static EMBEDDED: &[Embedded] = &[\n");
    for source in sources {
        let code = fs::read_to_string(source).unwrap_or_else(|error| stop(&format!("{}: {error}", source.display())));
        let kernels: Vec<&str> = code.lines().filter_map(|line| Some(line.strip_prefix("KERNEL(")?.split_once(')')?.0)).collect();
        let (name, fatbin) = (stem(source), out.join(stem(source)).with_extension("fatbin"));
        text += &format!("    Embedded {{ name: {name:?}, kernels: &{kernels:?}, code: include_bytes!({fatbin:?}) }},\n");
    }
    text + "];\n"
}
