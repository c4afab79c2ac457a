//! Compiles kernel sources into shared libraries, one per file and only when a kernel of it is asked for; a library is kept beside the
//! test programs under a name made of what went into it.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock};

use libloading::Library;
use xxhash_rust::xxh3::Xxh3;

use super::Run;
use super::memory::Sanitizer;
use super::signature::{self, Parameter};

/// The kernels of a folder.
pub(super) struct Kernels {
    compiler: Compiler,
    sources: Vec<Source>,
    /// Kernel to source.
    index: BTreeMap<String, usize>,
}

struct Source {
    path: PathBuf,
    library: OnceLock<Result<Library, String>>,
}

struct Compiler {
    program: String,
    flags: Vec<String>,
    /// Of the compiler, its flags and all headers.
    digest: Xxh3,
    /// Distinguishes kinds of libraries of one source.
    kind: &'static str,
    folder: PathBuf,
}

/// The kernels of `folder`, known once per process. None, after a message, where there is no C++ compiler.
pub(super) fn kernels(folder: &Path) -> Option<&'static Kernels> {
    static KNOWN: Mutex<BTreeMap<PathBuf, Option<&'static Kernels>>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock().expect("opening kernels does not panic");
    *known.entry(folder.to_owned()).or_insert_with(|| Some(Box::leak(Box::new(Kernels::open(folder)?))))
}

impl Kernels {
    fn open(folder: &Path) -> Option<Self> {
        let compiler = Compiler::find()?;
        let sources: Vec<Source> =
            files(folder, &["cu"], false).into_iter().map(|path| Source { path, library: OnceLock::new() }).collect();
        let mut index = BTreeMap::new();
        for (at, source) in sources.iter().enumerate() {
            for name in names(&fs::read_to_string(&source.path).expect("kernel sources are readable")) {
                let other = index.insert(name.clone(), at);
                assert!(other.is_none(), "two kernels are named {name}");
            }
        }
        Some(Self { compiler, sources, index })
    }

    /// The parameters of a kernel and its entry.
    pub(super) fn find(&self, kernel: &str) -> Result<(Vec<Parameter>, Run), String> {
        let &source = self.index.get(kernel).ok_or("no source has a line KERNEL(name) for it")?;
        let library = self.sources[source].load(&self.compiler)?;
        // SAFETY: the macro KERNEL defines both symbols with these types, and libraries are never unloaded.
        unsafe {
            let signature: libloading::Symbol<'_, unsafe extern "C" fn() -> *const c_char> =
                library.get(format!("signature_{kernel}")).map_err(|error| error.to_string())?;
            let run: libloading::Symbol<'_, Run> = library.get(format!("run_{kernel}")).map_err(|error| error.to_string())?;
            let text = CStr::from_ptr(signature()).to_string_lossy().into_owned();
            Ok((signature::parse(&text)?, *run))
        }
    }

    /// How to talk to the address sanitizer, when the kernels are built with it.
    pub(super) fn sanitizer(&self) -> Option<Sanitizer> {
        let source = self.sources.first().filter(|_| self.compiler.kind == "sanitized")?;
        let library = source.load(&self.compiler).ok()?;
        // SAFETY: the emulation defines both symbols with these types, and libraries are never unloaded.
        unsafe { Some(Sanitizer { guard: *library.get("emulate_guard").ok()?, unguard: *library.get("emulate_unguard").ok()? }) }
    }
}

impl Source {
    fn load(&self, compiler: &Compiler) -> Result<&Library, String> {
        let load = || {
            let path = compiler.library(&self.path)?;
            // SAFETY: the library runs no code of its own when it is loaded.
            unsafe { Library::new(&path) }.map_err(|error| error.to_string())
        };
        self.library.get_or_init(load).as_ref().map_err(Clone::clone)
    }
}

/// Whether kernels are built under the address and undefined-behaviour sanitizers.
pub(super) fn is_sanitized() -> bool {
    std::env::var_os("OSPREY_EMULATE_SANITIZE").is_some_and(|value| value == "1")
}

impl Compiler {
    fn find() -> Option<Self> {
        let program = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
        let Ok(version) = Command::new(&program).arg("--version").env_remove("LD_PRELOAD").output() else {
            // not eprintln: the message shall be seen although the test passes
            let _ = writeln!(std::io::stderr(), "SKIPPED: emulated kernels need a C++ compiler, and {program} does not run");
            return None;
        };
        let sanitize = is_sanitized();
        let flags = flags(sanitize);
        let mut digest = Xxh3::new();
        digest.update(&version.stdout);
        digest.update(flags.join(" ").as_bytes());
        for header in files(&super::repository_kernels(), &["cuh", "h"], true) {
            digest.update(&fs::read(header).expect("kernel headers are readable"));
        }
        let program_folder = std::env::current_exe().expect("a test program knows its path");
        let folder = program_folder.ancestors().nth(2).expect("tests lie in a folder of the target directory").join("emulated-kernels");
        Some(Self { program, flags, digest, kind: if sanitize { "sanitized" } else { "plain" }, folder })
    }

    /// The library of `source`, compiled unless it is there.
    fn library(&self, source: &Path) -> Result<PathBuf, String> {
        let mut digest = self.digest.clone();
        digest.update(&fs::read(source).map_err(|error| error.to_string())?);
        let stem = format!("{}-{}", source.file_stem().expect("a source has a name").display(), self.kind);
        let path = self.folder.join(format!("{stem}-{:032x}.so", digest.digest128()));
        if path.exists() {
            return Ok(path);
        }
        fs::create_dir_all(&self.folder).map_err(|error| format!("{}: {error}", self.folder.display()))?;
        let partial = self.folder.join(format!("{stem}-{}.partial", std::process::id()));
        let mut command = Command::new(&self.program);
        // the compiler itself shall not run under a sanitizer that the tests run under
        command.args(&self.flags).arg("-o").arg(&partial).arg(source).env_remove("LD_PRELOAD");
        let output = command.output().map_err(|error| format!("{}: {error}", self.program))?;
        if !output.status.success() {
            return Err(format!("{} does not compile:\n{}", source.display(), String::from_utf8_lossy(&output.stderr)));
        }
        self.remove_older(&stem);
        fs::rename(&partial, &path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(path)
    }

    fn remove_older(&self, stem: &str) {
        let prefix = format!("{stem}-");
        for path in files(&self.folder, &["so"], false) {
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix)) {
                let _ = fs::remove_file(path); // another test program may have been faster
            }
        }
    }
}

fn flags(sanitize: bool) -> Vec<String> {
    let mut flags = vec!["-x", "c++", "-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-ftls-model=initial-exec"];
    flags.extend(["-ffp-contract=off", "-fno-fast-math", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]);
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("fma") && std::arch::is_x86_feature_detected!("f16c") {
        flags.extend(["-mavx2", "-mfma", "-mf16c"]);
    }
    if sanitize {
        flags.extend(["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]);
    }
    flags.into_iter().map(str::to_owned).collect()
}

/// The kernels that a source registers: lines that start with `KERNEL(name)`.
fn names(text: &str) -> Vec<String> {
    text.lines().filter_map(|line| Some(line.strip_prefix("KERNEL(")?.split_once(')')?.0.trim().to_owned())).collect()
}

/// Files of a folder (and those below, `deep`) with one of the endings, sorted.
fn files(folder: &Path, endings: &[&str], deep: bool) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() && deep {
            found.extend(files(&path, endings, deep));
        } else if path.extension().is_some_and(|ending| endings.iter().any(|known| ending == *known)) {
            found.push(path);
        }
    }
    found.sort();
    found
}
