use super::*;
use crate::data::testing::corpora;
use proptest::prelude::*;

const MIXED: &str = "Hello world's 1234 cafés — naïve Führer 3 \u{1F680}\n\n\tтест  漢字 ok\r\n end \n";

#[test]
fn byte_tokens_are_the_bytes() {
    let tokenizer = Tokenizer::byte();
    assert_eq!(tokenizer.vocabulary(), 257);
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(256), Some(256)));
    let ids = tokenizer.encode(MIXED).unwrap();
    assert_eq!(ids, MIXED.bytes().map(u32::from).collect::<Vec<_>>());
    assert_eq!(tokenizer.decode(&ids).unwrap(), MIXED);
    assert!(tokenizer.is_special(256) && !tokenizer.is_special(10));
}

#[test]
fn characters_are_numbered_by_code_point_and_spell_any_script() {
    let tokenizer = Tokenizer::character(MIXED.chars()).unwrap();
    let mut letters: Vec<char> = MIXED.chars().collect();
    letters.sort_unstable();
    letters.dedup();
    let expected: Vec<u32> = MIXED.chars().map(|letter| letters.binary_search(&letter).unwrap() as u32).collect();
    assert_eq!(tokenizer.encode(MIXED).unwrap(), expected);
    assert_eq!(tokenizer.decode(&expected).unwrap(), MIXED);
    let plain = Tokenizer::character("hello".chars()).unwrap();
    assert_eq!(plain.vocabulary(), 5);
}

#[test]
fn a_character_outside_the_vocabulary_is_named() {
    let tokenizer = Tokenizer::character("abc".chars()).unwrap();
    let error = tokenizer.encode("ab\u{e9}").unwrap_err().to_string();
    assert!(error.contains("byte 2") && error.contains('\u{e9}'), "{error}");
    assert_eq!(tokenizer.encode("ab<|endoftext|>c").unwrap(), [0, 1, 3, 2]);
    let empty = Tokenizer::character("".chars()).unwrap_err();
    assert!(empty.hint().is_some());
}

#[test]
fn bpe_trains_the_same_every_time_and_shortens_text() {
    let texts: Vec<String> =
        (0..200).map(|n| format!("the cat number {n} sat on the mat, and the other cat sat there too.\nIt's {}.", n * n)).collect();
    let first = Tokenizer::train_bpe(&texts, 400).unwrap();
    for _ in 0..5 {
        assert_eq!(Tokenizer::train_bpe(&texts, 400).unwrap().fingerprint(), first.fingerprint());
    }
    let ids = first.encode(&texts[7]).unwrap();
    assert!(ids.len() * 2 < texts[7].len());
    assert_eq!(first.decode(&ids).unwrap(), texts[7]);
    assert_eq!(first.decode(&first.encode(MIXED).unwrap()).unwrap(), MIXED);
    assert_eq!(first.vocabulary(), first.eos().unwrap() as usize + 1);
    assert!(Tokenizer::train_bpe(&texts, 256).unwrap_err().to_string().contains("256 is outside"));
}

#[test]
fn saving_and_loading_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    for tokenizer in
        [Tokenizer::byte(), Tokenizer::character(MIXED.chars()).unwrap(), Tokenizer::train_bpe(&[MIXED.repeat(3)], 280).unwrap()]
    {
        tokenizer.save(folder.path()).unwrap();
        let loaded = Tokenizer::load(folder.path()).unwrap();
        assert_eq!(loaded.fingerprint(), tokenizer.fingerprint());
        assert_eq!((loaded.bos(), loaded.eos(), loaded.cut), (tokenizer.bos(), tokenizer.eos(), tokenizer.cut));
        assert_eq!(loaded.encode(MIXED).unwrap(), tokenizer.encode(MIXED).unwrap());
    }
}

#[test]
fn a_vocabulary_file_rebuilds_the_tokenizer() {
    let trained = Tokenizer::train_bpe(&[MIXED.repeat(3)], 280).unwrap();
    let pieces: Vec<String> = (0..trained.vocabulary() as u32).map(|id| trained.piece(id).unwrap()).collect();
    let merges: Vec<String> = trained.definition()["model"]["merges"]
        .as_array()
        .unwrap()
        .iter()
        .map(|pair| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()))
        .collect();
    let end = trained.eos().unwrap();
    let again = Tokenizer::from_byte_level(&pieces, &merges, &[end], Some(end), Some(end), true).unwrap();
    assert_eq!(again.fingerprint(), trained.fingerprint());
    assert!(Tokenizer::from_byte_level(&pieces, &["x".into()], &[], None, None, true).is_err());
    assert!(Tokenizer::from_byte_level(&pieces, &merges, &[], Some(9999), None, true).is_err());
}

#[test]
fn broken_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    assert!(Tokenizer::load(&path).unwrap_err().to_string().contains("tokenizer.json"));
    for text in ["", "[]", "{}", "{\"model\": 3}", "not json", "\u{0}\u{1}"] {
        std::fs::write(&path, text).unwrap();
        let error = Tokenizer::load(&path).unwrap_err();
        assert!(error.to_string().contains("tokenizer.json") && error.hint().is_some(), "{error}");
    }
    Tokenizer::byte().save(folder.path()).unwrap();
    std::fs::write(folder.path().join("tokenizer_config.json"), r#"{"bos_token": "<nope>", "add_bos_token": true}"#).unwrap();
    assert!(Tokenizer::load(folder.path()).unwrap_err().to_string().contains("<nope>"));
}

#[test]
fn streaming_gives_the_text_of_decoding_at_once() {
    let tokenizer = Tokenizer::byte();
    let mut stream = tokenizer.stream();
    let mut text = String::new();
    for id in tokenizer.encode(MIXED).unwrap() {
        text += &stream.push(id).unwrap();
    }
    assert_eq!(text + &stream.finish().unwrap(), MIXED);
    let mut stream = tokenizer.stream();
    assert_eq!(stream.push(0xC3).unwrap(), "");
    assert_eq!(stream.finish().unwrap(), "\u{FFFD}");
}

#[test]
fn gpt2_vectors() {
    let Some(folder) = corpora("tokenizers") else { return };
    let tokenizer = Tokenizer::load(&folder.join("gpt2")).unwrap();
    assert_eq!((tokenizer.vocabulary(), tokenizer.bos(), tokenizer.eos(), tokenizer.cut), (50257, None, Some(50256), Cut::LoneNewline));
    let (texts, expected) = vectors(&folder.join("ggml_vocab/ggml-vocab-gpt-2.gguf"));
    assert!(texts.len() >= 40);
    for (text, expected) in texts.iter().zip(&expected) {
        assert_eq!(&tokenizer.encode(text).unwrap(), expected, "{text:?}");
    }
    // The file carries a truncation to 50 tokens, which must not cut a document.
    assert!(tokenizer.encode(&"word ".repeat(500)).unwrap().len() > 400);
}

#[test]
fn llama2_vectors() {
    let Some(folder) = corpora("tokenizers") else { return };
    let tokenizer = Tokenizer::load(&folder.join("llama2")).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(1), Some(2)));
    let (texts, expected) = vectors(&folder.join("ggml_vocab/ggml-vocab-llama-spm.gguf"));
    for (text, expected) in texts.iter().zip(&expected).filter(|(text, _)| !text.is_empty()) {
        assert_eq!(&tokenizer.encode(text).unwrap(), expected, "{text:?}");
        assert_eq!(&tokenizer.decode(expected).unwrap(), text);
    }
}

fn vectors(stem: &Path) -> (Vec<String>, Vec<Vec<u32>>) {
    let read = |end: &str| std::fs::read_to_string(format!("{}.{end}", stem.display())).unwrap();
    let texts = read("inp").split("\n__ggml_vocab_test__\n").map(str::to_string).collect();
    let ids = read("out").lines().map(|line| line.split_whitespace().map(|id| id.parse().unwrap()).collect()).collect();
    (texts, ids)
}

#[test]
fn stories260k_starts_with_bos_and_a_leading_space_piece() {
    let Some(folder) = corpora("weights/stories260K-hf") else { return };
    let tokenizer = Tokenizer::load(&folder).unwrap();
    assert_eq!((tokenizer.vocabulary(), tokenizer.bos(), tokenizer.eos()), (512, Some(1), Some(2)));
    let ids = tokenizer.encode("Once upon a time, there was a little girl").unwrap();
    assert_eq!(ids, [403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421]);
    assert_eq!(tokenizer.decode(&ids).unwrap(), "Once upon a time, there was a little girl");
    let mut stream = tokenizer.stream();
    let text: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    assert_eq!(text, "Once upon a time, there was a little girl");
}

#[test]
fn cutting_a_long_document_changes_no_token() {
    let Some(folder) = corpora("") else { return };
    let tokenizer = Tokenizer::load(&folder.join("tokenizers/gpt2")).unwrap();
    for name in ["tinyshakespeare.txt", "code/", "rust_book.txt"] {
        let path = folder.join("text").join(name);
        let Ok(text) = std::fs::read_to_string(path) else { continue };
        let text: String = text.chars().take(300_000).collect();
        assert!(tokenizer.cut_document(&text).len() > 10);
        assert_eq!(tokenizer.encode(&text).unwrap(), tokenizer.encode_piece(&text).unwrap());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_text_survives_the_round_trip(text in ".{0,200}") {
        for tokenizer in [Tokenizer::byte(), Tokenizer::character(text.chars().chain(['x'])).unwrap()] {
            prop_assert_eq!(tokenizer.decode(&tokenizer.encode(&text).unwrap()).unwrap(), text.clone());
        }
    }

    #[test]
    fn cuts_never_change_tokens(lines in proptest::collection::vec("[ \\t\\r\\n]{0,3}[a-z' .,0-9\u{e9}]{0,12}[ \\n]{0,3}", 3000..3100)) {
        let text = lines.concat();
        let tokenizer = Tokenizer::train_bpe(std::slice::from_ref(&text), 300).unwrap();
        prop_assert_eq!(tokenizer.encode(&text).unwrap(), tokenizer.encode_piece(&text).unwrap());
    }

    #[test]
    fn random_bytes_are_refused_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, bytes).unwrap();
        prop_assert!(Tokenizer::load(&path).is_err());
    }
}
