//! What a kernel says of its parameters.

/// One parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Parameter {
    /// A pointer to elements of `size` bytes.
    Pointer {
        written: bool,
        size: usize,
        alignment: usize,
    },
    Unsigned32,
    Signed32,
    Unsigned64,
    Float32,
}

/// Parses the signature that the macro `KERNEL` makes, such as `r2:2 w4:4 u32 f32`.
pub(super) fn parse(text: &str) -> Result<Vec<Parameter>, String> {
    text.split_whitespace().map(|word| parameter(word).ok_or_else(|| format!("cannot pass a parameter of kind {word}"))).collect()
}

fn parameter(word: &str) -> Option<Parameter> {
    match word {
        "u32" => Some(Parameter::Unsigned32),
        "i32" => Some(Parameter::Signed32),
        "u64" => Some(Parameter::Unsigned64),
        "f32" => Some(Parameter::Float32),
        _ => {
            let (size, alignment) = word.get(1..)?.split_once(':')?;
            let written = match word.as_bytes()[0] {
                b'w' => true,
                b'r' => false,
                _ => return None,
            };
            Some(Parameter::Pointer { written, size: size.parse().ok()?, alignment: alignment.parse().ok()? })
        }
    }
}
