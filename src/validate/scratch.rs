use super::*;
use crate::infer::{Engine, bench, kv::Format};
use std::path::Path;
#[test]
#[ignore]
fn oracle() {
    let model = std::env::var("M").unwrap();
    let start = std::time::Instant::now();
    let engine = Engine::load(Path::new(&model)).unwrap();
    println!("load {:?} {:?}", start.elapsed(), engine.size());
    let protocol = Protocol { separator: Some("<|endoftext|>".into()), max_documents: Some(100) };
    let docs = documents::read(Path::new("/work/shared/corpora/text/tinystories_val.txt"), &protocol, engine.tokenizer().unwrap(), 512).unwrap();
    let start = std::time::Instant::now();
    println!("{:?}", evaluate(&engine, &docs, Format::F32, |_| {}).unwrap());
    println!("eval {:?}", start.elapsed());
    let mut session = crate::infer::Session::new(&engine, Format::F32, 200).unwrap();
    let ids = crate::infer::generate::prompt_ids(engine.tokenizer().unwrap(), "Once upon a time").unwrap();
    let text: String = crate::infer::generate::Generation::new(&mut session, &ids, Default::default(), 120).unwrap().map(|t| t.unwrap()).collect();
    println!("{text}");
    if let Ok(against) = std::env::var("A") {
        let reference = Engine::load(Path::new(&against)).unwrap();
        let report = compare(&engine, &reference, &docs, &Options { worst: 3, ..Default::default() }, |_| {}).unwrap();
        println!("{}", serde_json::to_string_pretty(&report).unwrap());
    }
}
#[test]
#[ignore]
fn speed() {
    let model = std::env::var("M").unwrap();
    let start = std::time::Instant::now();
    let engine = Engine::load(Path::new(&model)).unwrap();
    println!("load {:?} {:?}", start.elapsed(), engine.size());
    for _ in 0..3 {
        println!("{:?}", bench::measure(&engine, Format::F32, 1).unwrap());
    }
}
