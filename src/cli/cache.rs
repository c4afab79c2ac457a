//! The options that say how keys and values are kept and read.

use super::arguments::Cache;
use crate::error::Result;
use crate::infer::Processor;
use crate::infer::cache::Options;
use crate::infer::kv::Format;
use crate::recipe::CacheConfig;

impl Cache {
    /// The settings, checked. Sparse or certified attention without a format is over f16, and so is all on a GPU.
    pub(super) fn options(&self, processor: Processor) -> Result<Options> {
        let Self { kv, attention, epsilon, certificate } = self;
        let sparse = attention.as_deref().is_some_and(|policy| policy != "dense") || epsilon.is_some();
        let default = if sparse || processor != Processor::Cpu { Format::F16 } else { Format::default() };
        CacheConfig {
            kv: kv.clone().unwrap_or_else(|| default.name().to_owned()),
            attention: attention.clone().unwrap_or_else(|| "dense".to_owned()),
            epsilon: *epsilon,
            certificate: certificate.clone(),
        }
        .options()
    }
}
