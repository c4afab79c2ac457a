//! A recipe, with its last line as an override too; what reads well must print and read back the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use osprey::recipe::{Recipe, parse, to_toml};

fuzz_target!(|text: &str| {
    let flag = text.lines().last().unwrap_or_default().to_owned();
    let _ = parse::<Recipe>("fuzzed.toml", text, &[flag]);
    let Ok(recipe) = parse::<Recipe>("fuzzed.toml", text, &[]) else { return };
    let _ = recipe.check();
    let _ = recipe.model.resolve(257);
    if let Ok(printed) = to_toml(&recipe) {
        let again: Recipe = parse("printed.toml", &printed, &[]).expect("what was printed reads");
        assert_eq!(to_toml(&again).expect("prints"), printed);
    }
});
