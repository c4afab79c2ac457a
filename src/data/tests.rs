//! The whole stage: recipe section to batches.

use super::config::Config;
use super::dataset::Dataset;
use super::loader::{Cursor, Loader, Rows, Shape};
use super::pack::Batch;
use super::testing::corpora;
use std::path::Path;

fn open(section: &str, cache: &Path) -> crate::error::Result<Dataset> {
    let mut config: Config = toml::from_str(section).unwrap();
    config.cache = cache.to_path_buf();
    Dataset::open(&config, Path::new("."), &mut |_| ())
}

fn notes(section: &str, cache: &Path) -> Vec<String> {
    let mut config: Config = toml::from_str(section).unwrap();
    config.cache = cache.to_path_buf();
    let mut notes = Vec::new();
    Dataset::open(&config, Path::new("."), &mut |note| notes.push(note.to_string())).unwrap();
    notes
}

const TWO: &str = r#"
tokenizer.bpe = { vocab = 320 }
sources = [
  { builtin = { documents = 300, weight = 3.0 } },
  { builtin = { documents = 200, weight = 1.0, seed = 1, stories = 0.0 } },
]"#;

/// Inputs, targets, document starts and source of a row.
type Row = (Vec<u32>, Vec<u32>, Vec<u32>, u32);

/// The rows one by one, whatever batches they came in.
fn rows_of(batches: &[Batch]) -> Vec<Row> {
    let cut = |values: &[u32], row: usize, context: usize| values[row * context..(row + 1) * context].to_vec();
    let rows = |batch: &Batch| {
        let row = |row: usize| {
            (
                cut(&batch.inputs, row, batch.context),
                cut(&batch.targets, row, batch.context),
                cut(&batch.document_starts, row, batch.context),
                batch.sources[row],
            )
        };
        (0..batch.rows).map(row).collect::<Vec<_>>()
    };
    batches.iter().flat_map(rows).collect()
}

fn load(dataset: &Dataset, shape: Shape, cursor: Option<&Cursor>, count: usize) -> (Vec<Batch>, Cursor) {
    let mut loader = Loader::start(dataset, shape, 7, cursor).unwrap();
    let batches = (0..count).map(|_| Batch::clone(&loader.next_batch().unwrap())).collect();
    (batches, loader.cursor().clone())
}

#[test]
fn every_split_of_a_step_sees_the_same_rows() {
    let folder = tempfile::tempdir().unwrap();
    for order in ["packed", "whole", "crops"] {
        let dataset = open(&format!("order = \"{order}\"\n{TWO}"), folder.path()).unwrap();
        let shape = |rows, rank, ranks| Shape { rows, context: 48, rank, ranks };
        let whole = rows_of(&load(&dataset, shape(8, 0, 1), None, 6).0);
        assert_eq!(rows_of(&load(&dataset, shape(4, 0, 1), None, 12).0), whole);
        assert_eq!(rows_of(&load(&dataset, shape(1, 0, 1), None, 48).0), whole);
        let ranks: Vec<Vec<Batch>> = (0..2).map(|rank| load(&dataset, shape(4, rank, 2), None, 6).0).collect();
        let interleaved: Vec<Batch> = (0..6).flat_map(|at| ranks.iter().map(move |batches| batches[at].clone())).collect();
        assert_eq!(rows_of(&interleaved), whole);
    }
}

#[test]
fn resuming_goes_on_with_the_next_row() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = open(TWO, folder.path()).unwrap();
    let shape = Shape { rows: 4, context: 64, rank: 0, ranks: 1 };
    let (whole, _) = load(&dataset, shape, None, 200);
    let (head, cursor) = load(&dataset, shape, None, 77);
    let saved: Cursor = serde_json::from_str(&serde_json::to_string(&cursor).unwrap()).unwrap();
    let again = open(TWO, folder.path()).unwrap();
    let (tail, end) = load(&again, shape, Some(&saved), 123);
    assert_eq!(head.iter().chain(&tail).collect::<Vec<_>>(), whole.iter().collect::<Vec<_>>());
    assert_eq!(end.row, 800);
    let other = open(&TWO.replace("seed = 1", "seed = 2"), folder.path()).unwrap();
    let error = Loader::start(&other, shape, 7, Some(&saved)).unwrap_err();
    assert!(error.to_string().contains("other data") && error.hint().is_some());
}

#[test]
fn the_first_rows_come_from_the_first_source() {
    let folder = tempfile::tempdir().unwrap();
    let plain = open(TWO, folder.path()).unwrap();
    let staged = open(&format!("first_rows = 40\n{TWO}"), folder.path()).unwrap();
    assert_ne!(plain.fingerprint(), staged.fingerprint());
    let batch = |dataset: &Dataset| Rows::new(dataset, 32, 1).unwrap().batch(0, 400);
    let (plain, staged) = (batch(&plain), batch(&staged));
    assert!(staged.sources[..40].iter().all(|&source| source == 0));
    assert_eq!(staged.sources[40..], plain.sources[..360]);
    // No row comes twice.
    let of =
        |batch: &Batch, source: u32| rows_of(std::slice::from_ref(batch)).into_iter().filter(|row| row.3 == source).collect::<Vec<_>>();
    let (before, after) = (of(&plain, 0), of(&staged, 0));
    let common = before.len().min(after.len());
    assert_eq!(before[..common], after[..common]);
}

#[test]
fn shares_of_tokens_follow_the_weights() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = open(TWO, folder.path()).unwrap();
    assert!((dataset.train[0].share - 0.75).abs() < 1e-9);
    let batch = Rows::new(&dataset, 32, 1).unwrap().batch(0, 4096);
    assert_eq!(batch.sources.iter().filter(|&&source| source == 1).count(), 1024);
    assert_eq!(batch.trained_tokens(), 4096 * 32);
}

#[test]
fn shards_are_reused_until_something_changes() {
    let folder = tempfile::tempdir().unwrap();
    let (cache, text) = (folder.path().join("cache"), folder.path().join("a.txt"));
    std::fs::write(&text, "one two three\n<|endoftext|>\nfour five six\n<|endoftext|>\nseven").unwrap();
    let section = format!("path = {text:?}\nvalidation.every = 3\ntokenizer = \"character\"");
    assert_eq!(notes(&section, &cache).len(), 2);
    assert!(notes(&section, &cache).is_empty());
    assert_eq!(notes(&section.replace("every = 3", "every = 2"), &cache).len(), 2);
    std::fs::write(&text, "one two three\n<|endoftext|>\nfour five sin\n<|endoftext|>\nseven").unwrap();
    assert_eq!(notes(&section, &cache).len(), 2);
    assert!(notes(&section, &cache).is_empty());
    for shard in std::fs::read_dir(&cache)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end == "tokens"))
    {
        std::fs::write(shard, "torn").unwrap();
    }
    assert_eq!(notes(&section, &cache), ["tokenizing a"]);
}

#[test]
fn held_out_documents_are_not_trained() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("a.txt");
    let documents: Vec<String> = (0..10).map(|at| format!("document {at}")).collect();
    std::fs::write(&text, documents.join("<|endoftext|>")).unwrap();
    let dataset = open(&format!("path = {text:?}\nvalidation.every = 5"), folder.path()).unwrap();
    let texts = |part: &super::Part| {
        (0..part.shard.documents()).map(|at| dataset.tokenizer.decode(&part.shard.document(at)).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(texts(&dataset.validation[0]), ["document 4", "document 9"]);
    assert_eq!(texts(&dataset.train[0]).len(), 8);
    let tail = open(&format!("sources = [{{ text = {{ path = {text:?} }} }}]\nvalidation.tail = 0.1"), folder.path()).unwrap();
    let all = documents.join("<|endoftext|>");
    let kept: String = all.chars().take((all.len() as f64 * 0.9) as usize).collect();
    assert_eq!(tail.train[0].shard.document(0), tail.tokenizer.encode(&kept).unwrap());
    let held = folder.path().join("held.txt");
    std::fs::write(&held, "something else").unwrap();
    let apart = open(&format!("path = {text:?}\nvalidation.path = {held:?}"), folder.path()).unwrap();
    assert_eq!((apart.train[0].shard.documents(), apart.validation.len()), (10, 1));
    assert!(
        open(&format!("path = {text:?}\nvalidation.every = 11"), folder.path()).unwrap_err().to_string().contains("holds out no document")
    );
}

#[test]
fn validation_covers_every_held_out_token_once() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = open(TWO, folder.path()).unwrap();
    let rules = dataset.rules();
    let pairs: u64 = dataset.validation.iter().map(|part| super::pack::Stream::stored(part.shard.clone(), rules).pairs()).sum();
    let batches = dataset.validation_batches(4, 64, None);
    assert_eq!(batches.iter().map(|batch| batch.trained_tokens() as u64).sum::<u64>(), pairs);
    let few = dataset.validation_batches(4, 64, Some(12));
    assert_eq!((few.len(), few.iter().flat_map(|batch| batch.sources.iter()).filter(|&&source| source == 1).count() > 0), (3, true));
    assert_eq!(dataset.validation_batches(4, 64, None), batches);
}

#[test]
fn attending_across_documents_joins_them() {
    let folder = tempfile::tempdir().unwrap();
    let apart = open(TWO, folder.path()).unwrap();
    let joined = open(&format!("attend_across_documents = true\n{TWO}"), folder.path()).unwrap();
    let (one, two) = (Rows::new(&apart, 200, 3).unwrap().batch(0, 4), Rows::new(&joined, 200, 3).unwrap().batch(0, 4));
    assert_eq!(one.inputs, two.inputs);
    assert!(one.document_starts.iter().any(|&start| start > 0) && two.document_starts.iter().all(|&start| start == 0));
    assert!(two.positions.chunks(200).all(|row| row.iter().enumerate().all(|(at, &position)| at as u32 == position)));
    assert_ne!(apart.fingerprint(), joined.fingerprint());
}

#[test]
fn mistakes_are_one_clear_error() {
    let folder = tempfile::tempdir().unwrap();
    let (cache, text) = (folder.path().join("cache"), folder.path().join("a.txt"));
    let error = |content: &str, section: &str| {
        std::fs::write(&text, content).unwrap();
        open(&section.replace("PATH", &format!("{text:?}")), &cache).unwrap_err().to_string()
    };
    assert!(error("", "path = PATH").contains("no documents to train on"));
    assert!(error(" \n<|endoftext|>\n", "path = PATH").contains("no documents to train on"));
    assert!(error("text", "path = PATH\ntokenizer.bpe = { vocab = 10 }").contains("10 is outside"));
    assert!(error("text", "path = PATH\ntokenizer.file = \"/nonexistent.json\"").contains("nonexistent.json"));
    assert!(error("", "path = PATH\ntokenizer = \"character\"").contains("no characters"));
    std::fs::write(&text, "short").unwrap();
    let dataset = open(&format!("path = {text:?}\nvalidation = \"none\""), &cache).unwrap();
    assert!(Rows::new(&dataset, 100, 0).unwrap_err().to_string().contains("6 tokens to predict, fewer than one row of 100"));
    let leftovers = std::fs::read_dir(&cache)
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().path().extension().is_some_and(|end| end == "part"))
        .count();
    assert_eq!(leftovers, 0);
}

#[test]
fn a_report_shows_text_and_boundaries() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = open(TWO, folder.path()).unwrap();
    let report = super::report(&dataset, 4, 128, 0, 2).unwrap();
    assert_eq!((report.batch.trained_tokens, report.batch.shown.len(), report.train.len()), (512, 2, 2));
    assert!((report.train[0].measured_share - 0.75).abs() < 1e-9 && report.train[0].bytes_per_token > 1.0);
    let text = report.to_string();
    assert!(text.contains("--- document begins") && text.contains("100.0%") && !text.contains('\x1b'));
    assert!(report.render(true).contains('\x1b'));
    assert!(serde_json::to_value(&report).unwrap()["batch"]["shown"][0]["documents"][0]["text"].is_string());
}

#[test]
fn tinyshakespeare_is_split_as_nanogpt_splits_it() {
    let Some(text) = corpora("text/tinyshakespeare.txt") else { return };
    let folder = tempfile::tempdir().unwrap();
    let section =
        format!("sources = [{{ text = {{ path = {text:?} }} }}]\ntokenizer = \"character\"\nvalidation.tail = 0.1\norder = \"crops\"");
    let dataset = open(&section, folder.path()).unwrap();
    assert_eq!(
        (dataset.tokenizer.vocabulary(), dataset.train[0].shard.tokens(), dataset.validation[0].shard.tokens()),
        (66, 1_003_854, 111_540)
    );
    let batch = Rows::new(&dataset, 64, 0).unwrap().batch(0, 12);
    assert_eq!(batch.trained_tokens(), 12 * 64);
}
