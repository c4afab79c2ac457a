//! The dotted keys a type reads, found by letting it read from a source that answers everything.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;

use serde::de::value::{Error, StrDeserializer};
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, Error as _, IntoDeserializer, MapAccess, SeqAccess, VariantAccess, Visitor,
};

/// Deeper nesting than any recipe has; a recursive type ends here.
const MAX_DEPTH: usize = 16;

/// Every dotted key of `T`, in name order: tables, their keys, and the keys of every choice. Elements of a list share the list's key.
pub fn keys<T: DeserializeOwned>() -> Vec<String> {
    let walk = Walk::default();
    let mut choice = 0;
    // One round reads one choice of each enum. A round ends early where a type refuses the made-up value; the key is left out of the next.
    loop {
        walk.blamed.set(false);
        let _ = T::deserialize(Probe { walk: &walk, path: String::new(), depth: 0, choice });
        if walk.blamed.get() {
            continue;
        }
        choice += 1;
        if choice >= walk.most_choices.get() {
            return walk.found.into_inner().into_iter().collect();
        }
    }
}

#[derive(Default)]
struct Walk {
    found: RefCell<BTreeSet<String>>,
    /// Paths (with the round's choice) whose type refused the made-up value.
    refused: RefCell<BTreeSet<(usize, String)>>,
    /// This round has already named the key it failed at.
    blamed: Cell<bool>,
    most_choices: Cell<usize>,
}

#[derive(Clone)]
struct Probe<'a> {
    walk: &'a Walk,
    path: String,
    depth: usize,
    choice: usize,
}

impl Probe<'_> {
    fn child(&self, key: &str) -> Self {
        let path = if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) };
        Self { path, depth: self.depth + 1, ..self.clone() }
    }

    fn is_refused(&self) -> bool {
        self.walk.refused.borrow().contains(&(self.choice, self.path.clone()))
    }

    fn record(&self) {
        self.walk.found.borrow_mut().insert(self.path.clone());
    }
}

macro_rules! answers {
    ($($method:ident => $visit:ident($($value:expr)?)),* $(,)?) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            visitor.$visit($($value)?)
        })*
    };
}

impl<'de> Deserializer<'de> for Probe<'_> {
    type Error = Error;

    // 1 and not 0, so that types which refuse zero are satisfied.
    answers! {
        deserialize_bool => visit_bool(true), deserialize_char => visit_char('x'), deserialize_str => visit_str("x"),
        deserialize_string => visit_str("x"), deserialize_bytes => visit_bytes(b"x"), deserialize_byte_buf => visit_bytes(b"x"),
        deserialize_i8 => visit_i8(1), deserialize_i16 => visit_i16(1), deserialize_i32 => visit_i32(1), deserialize_i64 => visit_i64(1),
        deserialize_u8 => visit_u8(1), deserialize_u16 => visit_u16(1), deserialize_u32 => visit_u32(1), deserialize_u64 => visit_u64(1),
        deserialize_f32 => visit_f32(1.0), deserialize_f64 => visit_f64(1.0), deserialize_unit => visit_unit(),
        deserialize_identifier => visit_str("x"), deserialize_ignored_any => visit_unit(),
    }

    fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, Error> {
        Err(Error::custom("the type does not say what it reads"))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(self, _name: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _name: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_seq(Elements { probe: self, left: 1 })
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_seq(Elements { probe: self, left: len })
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(self, _name: &'static str, len: usize, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_seq(Elements { probe: self, left: len })
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_map(Fields { probe: self, names: &[], current: None })
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        if self.depth > MAX_DEPTH {
            return Err(Error::custom("nested too deeply"));
        }
        fields.iter().for_each(|field| self.child(field).record());
        visitor.visit_map(Fields { probe: self, names: fields, current: None })
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.walk.most_choices.set(variants.len().max(self.walk.most_choices.get()));
        let variant = variants.get(self.choice % variants.len().max(1)).ok_or_else(|| Error::custom("no choices"))?;
        visitor.visit_enum(Choice { probe: self, variant })
    }
}

struct Fields<'a> {
    probe: Probe<'a>,
    names: &'static [&'static str],
    current: Option<Probe<'a>>,
}

impl<'de> MapAccess<'de> for Fields<'_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        while let [name, rest @ ..] = self.names {
            self.names = rest;
            let child = self.probe.child(name);
            if !child.is_refused() {
                self.current = Some(child);
                let key: StrDeserializer<'_, Error> = name.into_deserializer();
                return seed.deserialize(key).map(Some);
            }
        }
        Ok(None)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let probe = self.current.take().ok_or_else(|| Error::custom("a value before its key"))?;
        let mark = (probe.choice, probe.path.clone());
        let walk = probe.walk;
        seed.deserialize(probe).inspect_err(|_| {
            // The error passes the innermost key first; an outer one may read well once that is left out.
            if !walk.blamed.replace(true) {
                walk.refused.borrow_mut().insert(mark);
            }
        })
    }
}

struct Elements<'a> {
    probe: Probe<'a>,
    left: usize,
}

impl<'de> SeqAccess<'de> for Elements<'_> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Error> {
        if self.left == 0 {
            return Ok(None);
        }
        self.left -= 1;
        seed.deserialize(self.probe.clone()).map(Some)
    }
}

struct Choice<'a> {
    probe: Probe<'a>,
    variant: &'static str,
}

impl<'de, 'a> EnumAccess<'de> for Choice<'a> {
    type Error = Error;
    type Variant = Payload<'a>;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Payload<'a>), Error> {
        let name: StrDeserializer<'_, Error> = self.variant.into_deserializer();
        Ok((seed.deserialize(name)?, Payload(self.probe.child(self.variant))))
    }
}

/// What a variant holds. Only one with content is a key of its own.
struct Payload<'a>(Probe<'a>);

impl<'de> VariantAccess<'de> for Payload<'_> {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Error> {
        self.0.record();
        seed.deserialize(self.0)
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, Error> {
        self.0.record();
        self.0.deserialize_tuple(len, visitor)
    }

    fn struct_variant<V: Visitor<'de>>(self, fields: &'static [&'static str], visitor: V) -> Result<V::Value, Error> {
        self.0.record();
        self.0.deserialize_struct("", fields, visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Deserialize)]
    #[expect(dead_code, reason = "only its shape is read")]
    struct Outer {
        first: Inner,
        second: Option<Inner>,
        list: Vec<Inner>,
        rule: Rule,
    }

    #[derive(Deserialize)]
    #[expect(dead_code, reason = "only its shape is read")]
    struct Inner {
        picky: Picky,
        plain: f64,
    }

    #[derive(Deserialize)]
    #[serde(try_from = "String")]
    struct Picky;

    impl TryFrom<String> for Picky {
        type Error = String;
        fn try_from(_: String) -> Result<Self, String> {
            Err("never".into())
        }
    }

    #[derive(Deserialize)]
    #[expect(dead_code, reason = "only its shape is read")]
    enum Rule {
        Plain,
        Scaled { by: f64 },
        Wrapped(Inner),
    }

    #[test]
    fn every_key_is_found_even_where_values_are_refused() {
        let found = keys::<Outer>();
        let expected = [
            "first",
            "first.picky",
            "first.plain",
            "list",
            "list.picky",
            "list.plain",
            "rule",
            "rule.Scaled",
            "rule.Scaled.by",
            "rule.Wrapped",
            "rule.Wrapped.picky",
            "rule.Wrapped.plain",
            "second",
            "second.picky",
            "second.plain",
        ];
        assert_eq!(found, expected);
    }

    #[derive(Deserialize)]
    #[expect(dead_code, reason = "only its shape is read")]
    struct Endless {
        next: Option<Box<Endless>>,
    }

    #[test]
    fn a_recursive_type_ends() {
        assert!(keys::<Endless>().len() <= MAX_DEPTH + 2);
        assert!(keys::<f64>().is_empty());
    }
}
