//! What can be typed. Knobs that affect a result live in recipes; the command line picks a command, its input and its output.

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Trains language models that stay good when they are quantized, and proves it.
#[derive(Debug, Parser)]
#[command(name = "osprey", version, disable_help_subcommand = true)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Command,
    /// Print results, warnings and errors only.
    #[arg(long, short, global = true)]
    pub quiet: bool,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Pretrain, then export and validate as the recipe asks.
    Train(Train),
    /// Write a model in a format that other engines load.
    Export(Export),
    /// Run an exported file and its original, and say what was lost.
    Validate(Validate),
    /// Negative log-likelihood per token of a text, accuracy on tasks.
    Eval(Eval),
    /// Continue a prompt.
    Generate(Generate),
    /// Tokenize and shard a recipe's data and show what a batch really contains.
    Data(RecipeOnly),
    /// What a recipe will build and cost: parameters, optimizer rules, engines, memory, time.
    Plan(RecipeOnly),
    /// What is in a run, checkpoint, GGUF file or token shard.
    Inspect(Inspect),
    /// What this machine has, and each kernel against its reference.
    Doctor(Doctor),
    /// Speed beside the machine's limits.
    Bench(Bench),
}

/// A recipe with its overrides.
#[derive(Args, Debug)]
pub struct RecipeArguments {
    /// Recipe, TOML.
    pub recipe: PathBuf,
    /// Override one key, for example `--set train.steps=100`.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
}

#[derive(Args, Debug)]
pub struct Report {
    /// Write the figures as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub struct Doctor {
    /// Check the GPU's kernels and time nothing.
    #[arg(long)]
    pub checks_only: bool,
    #[command(flatten)]
    pub report: Report,
}

#[derive(Args, Debug)]
pub struct RecipeOnly {
    #[command(flatten)]
    pub recipe: RecipeArguments,
    #[command(flatten)]
    pub report: Report,
}

#[derive(Args, Debug)]
pub struct Train {
    #[command(flatten)]
    pub recipe: RecipeArguments,
    /// Where to continue: the run's newest whole checkpoint when there is one, never, or a checkpoint folder.
    #[arg(long, value_name = "auto|never|DIR", default_value = "auto")]
    pub resume: String,
    /// Where to compute: `cpu` or `cuda:N`.
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// Prove on this recipe that an interrupted and resumed run gives the same bits, and stop.
    #[arg(long)]
    pub verify_resume: bool,
    /// Run only the batch of a step that failed, from the file it left.
    #[arg(long, value_name = "FILE")]
    pub replay: Option<PathBuf>,
    #[command(flatten)]
    pub report: Report,
}

#[derive(Args, Debug)]
pub struct Export {
    /// Checkpoint, Hugging Face or adapter directory, or GGUF file.
    pub model: PathBuf,
    /// Format of the artifact.
    #[arg(long)]
    pub format: String,
    /// File (GGUF) or directory to write.
    #[arg(long)]
    pub out: PathBuf,
    /// Text that the merge of an adapter into a ternary base is measured on.
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// What separates the documents of that text.
    #[arg(long, value_name = "STRING", allow_hyphen_values = true)]
    pub document_separator: Option<String>,
    /// Read only this many documents of it.
    #[arg(long, value_name = "N")]
    pub max_documents: Option<usize>,
    /// The most nats per token that such a merge may cost.
    #[arg(long, value_name = "NATS", default_value_t = crate::recipe::MERGE_LIMIT)]
    pub merge_limit: f64,
    #[command(flatten)]
    pub report: Report,
}

/// How a text becomes documents.
#[derive(Args, Debug)]
pub struct Documents {
    /// What separates documents; without it the file is one document.
    #[arg(long, value_name = "STRING", allow_hyphen_values = true)]
    pub document_separator: Option<String>,
    /// Read only this many documents, or questions of a task.
    #[arg(long, value_name = "N")]
    pub max_documents: Option<usize>,
    /// Cut documents to this many tokens, the beginning-of-text token included; the model's context by default.
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,
}

/// What a model runs on.
#[derive(Args, Debug)]
pub struct Processor {
    /// Where to compute: `cpu` or `cuda:N`.
    #[arg(long, default_value = "cpu")]
    pub device: String,
}

/// How keys and values are kept and read.
#[derive(Args, Debug)]
pub struct Cache {
    /// How the cache stores keys and values: f32 (as trained, the default on the CPU), f16 (the default on a GPU), fp8, int8-int4, turboquant-2, -2.5, -3, -3.5, -4, oscar-2.
    #[arg(long, value_name = "FORMAT")]
    pub kv: Option<String>,
    /// Which pages of the cache a token reads: dense (all, the default), window[=TOKENS], quest[=PAGES], top-k[=SHARE or PAGES].
    #[arg(long, value_name = "POLICY")]
    pub attention: Option<String>,
    /// Largest error of attention against the FP16 cache, relative to the output's norm (0 to 1): what is not certified to be within it is
    /// computed from the FP16 originals.
    #[arg(long, value_name = "E")]
    pub epsilon: Option<f32>,
    /// What has to be within epsilon: hard (a bound that nothing breaks) or metered (calibrated, no guarantee).
    #[arg(long, value_name = "hard|metered", default_value = "hard")]
    pub certificate: String,
}

#[derive(Args, Debug)]
pub struct Validate {
    /// Exported file or directory.
    pub artifact: PathBuf,
    /// The model it was made from.
    #[arg(long, value_name = "MODEL")]
    pub against: PathBuf,
    /// Text file (UTF-8), or JSONL with a `text` field.
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    #[command(flatten)]
    pub documents: Documents,
    #[command(flatten)]
    pub processor: Processor,
    #[command(flatten)]
    pub cache: Cache,
    #[command(flatten)]
    pub report: Report,
}

#[derive(Args, Debug)]
pub struct Eval {
    /// Checkpoint, Hugging Face directory or GGUF file.
    pub model: PathBuf,
    /// Text file (UTF-8), or JSONL with a `text` field.
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    #[command(flatten)]
    pub documents: Documents,
    /// Questions with choices, JSONL: share of right answers, by log-likelihood and by log-likelihood per character. May be repeated.
    #[arg(long = "task", value_name = "NAME=FILE")]
    pub tasks: Vec<String>,
    #[command(flatten)]
    pub processor: Processor,
    #[command(flatten)]
    pub cache: Cache,
    /// Write one JSON line per predicted token: document, position, token, nll, top1.
    #[arg(long, value_name = "FILE")]
    pub tokens: Option<PathBuf>,
    #[command(flatten)]
    pub report: Report,
}

#[derive(Args, Debug)]
pub struct Generate {
    /// Checkpoint, Hugging Face directory or GGUF file.
    pub model: PathBuf,
    /// Text to continue.
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    pub prompt: String,
    /// Ask this through the model's chat template, and print the answer.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, conflicts_with = "prompt")]
    pub chat: Option<String>,
    /// Answer the conversation in this JSON file: a list of objects with role and content, or a record of training data without its answer.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "chat"])]
    pub messages: Option<PathBuf>,
    /// Tokens to generate at most.
    #[arg(long, default_value_t = 128)]
    pub max_tokens: usize,
    /// 0 always takes the likeliest token.
    #[arg(long, default_value_t = 0.8)]
    pub temperature: f32,
    /// Keep the K likeliest tokens; 0 keeps all.
    #[arg(long, default_value_t = 0)]
    pub top_k: usize,
    /// Keep the likeliest tokens that together have this probability.
    #[arg(long, default_value_t = 1.0)]
    pub top_p: f32,
    /// Keep tokens with at least this share of the likeliest one's probability.
    #[arg(long, default_value_t = 0.05)]
    pub min_p: f32,
    /// Equal seeds give equal text.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    #[command(flatten)]
    pub processor: Processor,
    #[command(flatten)]
    pub cache: Cache,
}

#[derive(Args, Debug)]
pub struct Inspect {
    /// Run folder, checkpoint, Hugging Face directory, GGUF file or token shard.
    pub path: PathBuf,
    #[command(flatten)]
    pub report: Report,
}

/// What to time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BenchTarget {
    /// Training steps of a recipe, on random tokens.
    Train,
    /// Prompt and decode speed of a model file.
    Decode,
    /// The CPU kernels.
    Kernels,
    /// One step of each optimizer rule beside forward and backward.
    Optim,
    /// What ways of fine-tuning forget: methods and rates of a recipe's [forgetting].
    Finetune,
}

#[derive(Args, Debug)]
pub struct Bench {
    /// What to time.
    pub what: BenchTarget,
    /// Recipe (train, optim, finetune) or model (decode).
    pub input: Option<PathBuf>,
    /// Decode at the end of a cache of this many tokens, beyond the model's own context if need be, beside the machine's plain reads.
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,
    #[command(flatten)]
    pub cache: Cache,
    /// Override one key of the recipe.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Timed repetitions.
    #[arg(long, default_value_t = 6)]
    pub steps: usize,
    /// Train with every rule (optim), learning rates tuned, three seeds, and print the table; goes on where it was interrupted.
    #[arg(long)]
    pub compare: bool,
    /// With --compare: the switches of outlier-safe pre-training instead of the rules.
    #[arg(long, requires = "compare")]
    pub osp: bool,
    #[command(flatten)]
    pub report: Report,
}
