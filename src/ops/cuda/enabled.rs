//! A GPU, through candle's CUDA device and cudarc.
//!
//! Kernels come embedded in the program. The environment variable `OSPREY_KERNELS` names a folder of freshly built ones
//! (`kernels/build.sh`), which go before them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::{env, fs};

use candle_core::cuda_backend::cudarc::driver::result::{self, DriverError};
use candle_core::cuda_backend::cudarc::driver::sys::{self, CUdevice_attribute_enum, CUdeviceptr, CUfunction_attribute_enum, CUresult};
use candle_core::cuda_backend::cudarc::driver::{CudaFunction, CudaModule, CudaStream, LaunchConfig, PushKernelArg};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;

use super::device::{Arg, Device, Place, defect, within};
use crate::error::{Error, Result};

/// One compiled source of `kernels/`: its name, its kernels and its code for every architecture.
struct Embedded {
    name: &'static str,
    kernels: &'static [&'static str],
    code: &'static [u8],
}

include!(concat!(env!("OUT_DIR"), "/embedded_kernels.rs"));

/// Dynamic shared memory that a kernel may have without asking.
const SHARED_UNASKED: u32 = 48 * 1024;

/// A GPU and the kernels loaded on it.
pub struct Cuda {
    device: candle_core::Device,
    stream: Arc<CudaStream>,
    ordinal: usize,
    folder: Option<PathBuf>,
    loaded: Mutex<Loaded>,
}

#[derive(Default)]
struct Loaded {
    /// Of the folder; none until the first launch.
    fresh: Option<Vec<Arc<CudaModule>>>,
    embedded: BTreeMap<&'static str, Arc<CudaModule>>,
    kernels: BTreeMap<String, Kernel>,
}

#[derive(Clone)]
struct Kernel {
    function: CudaFunction,
    /// Dynamic shared memory it may have now.
    shared: u32,
}

/// One allocation: freed in the order of the stream, or page-locked on the host.
pub struct Memory {
    pointer: CUdeviceptr,
    len: usize,
    place: Place,
    stream: Arc<CudaStream>,
}

impl Cuda {
    /// Opens the GPU with number `ordinal`, with a stream of its own.
    ///
    /// # Errors
    /// When there is no such GPU or no driver.
    pub fn new(ordinal: usize) -> Result<Self> {
        let place = format!("device cuda:{ordinal}");
        let open = |error: candle_core::Error| {
            Error::input(&place, format!("cannot be opened: {error}")).fix("check with nvidia-smi that the GPU and its driver are there")
        };
        let device = candle_core::Device::new_cuda_with_stream(ordinal).map_err(open)?;
        let stream = device.as_cuda_device().map_err(open)?.cuda_stream();
        let folder = env::var_os("OSPREY_KERNELS").map(PathBuf::from);
        let opened = Self { device, stream, ordinal, folder, loaded: Mutex::default() };
        opened.keep_memory()?;
        Ok(opened)
    }

    /// Lets freed memory stay with the process: by default the driver returns it to the system whenever the host waits for the device, so
    /// that small buffers of every step would cost a system call each.
    fn keep_memory(&self) -> Result<()> {
        let context = self.stream.context();
        if !context.has_async_alloc() {
            return Ok(());
        }
        let mut threshold = u64::MAX;
        // SAFETY: the context's own device and its default pool; the attribute is a 64-bit integer, which outlives the call.
        let set = unsafe {
            let pool = result::device::get_default_mem_pool(context.cu_device());
            let attribute = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            pool.and_then(|pool| result::mem_pool::set_attribute(pool, attribute, (&raw mut threshold).cast()))
        };
        set.map_err(|error| self.failed("keep memory", error))
    }

    /// Candle's view of the same GPU and stream.
    pub fn candle(&self) -> &candle_core::Device {
        &self.device
    }

    /// Seconds that the device takes for what `work` asks of it, by the device's own clock.
    ///
    /// # Errors
    /// Those of `work`, and when the device fails.
    pub fn seconds(&self, work: impl FnOnce() -> Result<()>) -> Result<f64> {
        let timed = sys::CUevent_flags::CU_EVENT_DEFAULT;
        let start = self.stream.record_event(Some(timed)).map_err(|error| self.failed("time", error))?;
        work()?;
        let end = self.stream.record_event(Some(timed)).map_err(|error| self.failed("time", error))?;
        let milliseconds = start.elapsed_ms(&end).map_err(|error| self.failed("time", error))?;
        Ok(f64::from(milliseconds) / 1e3)
    }

    fn failed(&self, action: &str, error: DriverError) -> Error {
        defect(format!("cuda:{}: cannot {action}: {error}", self.ordinal))
    }

    fn bind(&self) -> Result<()> {
        self.stream.context().bind_to_thread().map_err(|error| self.failed("use the device", error))
    }

    /// Copies between any two places that the device reaches, in the order of the stream.
    fn transfer(&self, from: CUdeviceptr, to: CUdeviceptr, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the callers have checked that both ranges lie within allocations or slices that outlive the copy: the driver has read
        // pageable host memory when this returns, and whoever reads into it waits for the stream.
        unsafe { sys::cuMemcpyAsync(to, from, bytes, self.stream.cu_stream()) }.result().map_err(|error| self.failed("copy", error))
    }

    /// The kernel, ready for `shared_bytes` of dynamic shared memory.
    fn kernel(&self, name: &str, shared_bytes: u32) -> Result<CudaFunction> {
        let mut loaded = self.loaded.lock().expect("loading kernels does not panic");
        if !loaded.kernels.contains_key(name) {
            let function = self.find(&mut loaded, name)?;
            loaded.kernels.insert(name.to_owned(), Kernel { function, shared: SHARED_UNASKED });
        }
        let kernel = loaded.kernels.get_mut(name).expect("inserted above");
        if shared_bytes > kernel.shared {
            let attribute = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let size = i32::try_from(shared_bytes).map_err(|_| defect(format!("kernel {name}: {shared_bytes} bytes of shared memory")))?;
            kernel
                .function
                .set_attribute(attribute, size)
                .map_err(|error| self.failed(&format!("give {name} {size} bytes of shared memory"), error))?;
            kernel.shared = shared_bytes;
        }
        Ok(kernel.function.clone())
    }

    fn find(&self, loaded: &mut Loaded, name: &str) -> Result<CudaFunction> {
        if loaded.fresh.is_none() {
            loaded.fresh = Some(self.folder.as_deref().map_or(Ok(Vec::new()), |folder| self.load_folder(folder))?);
        }
        for module in loaded.fresh.iter().flatten() {
            match module.load_function(name) {
                Ok(function) => return Ok(function),
                Err(DriverError(CUresult::CUDA_ERROR_NOT_FOUND)) => {}
                Err(error) => return Err(self.failed(&format!("load the kernel {name}"), error)),
            }
        }
        let source = EMBEDDED.iter().find(|source| source.kernels.contains(&name));
        let source = source.ok_or_else(|| defect(format!("no kernel is named {name}")))?;
        if !loaded.embedded.contains_key(source.name) {
            let module = self.stream.context().load_module(Ptx::from_binary(source.code.to_vec()));
            let module = module.map_err(|error| self.not_built_for(source.name, error))?;
            loaded.embedded.insert(source.name, module);
        }
        loaded.embedded[source.name].load_function(name).map_err(|error| self.failed(&format!("load the kernel {name}"), error))
    }

    fn load_folder(&self, folder: &Path) -> Result<Vec<Arc<CudaModule>>> {
        let entries = fs::read_dir(folder).map_err(Error::io("read", folder))?;
        let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        paths.retain(|path| path.extension().is_some_and(|ending| ending == "cubin" || ending == "fatbin" || ending == "ptx"));
        paths.sort();
        if paths.is_empty() {
            return Err(Error::file(folder, "holds no .cubin, .fatbin or .ptx file").fix("build kernels into it with kernels/build.sh"));
        }
        let load = |path: &PathBuf| {
            let module = self.stream.context().load_module(Ptx::from_file(path));
            module.map_err(|error| Error::file(path, format!("cannot be loaded: {error}")).fix("build it for this GPU's architecture"))
        };
        paths.iter().map(load).collect()
    }

    fn not_built_for(&self, source: &str, error: DriverError) -> Error {
        Error::input(format!("device cuda:{}", self.ordinal), format!("the kernels of {source} cannot be loaded: {error}"))
            .fix("build osprey for this GPU: CUDA_COMPUTE_CAP names its compute capability, such as 90")
    }

    fn attribute(&self, attribute: CUdevice_attribute_enum) -> Option<u32> {
        u32::try_from(self.stream.context().attribute(attribute).ok()?).ok()
    }
}

impl Device for Cuda {
    type Memory = Memory;

    fn describe(&self) -> String {
        let name = self.stream.context().name().unwrap_or_else(|_| "GPU".to_owned());
        let [major, minor] = [
            CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        ]
        .map(|attribute| self.attribute(attribute).map_or_else(|| "?".to_owned(), |number| number.to_string()));
        format!("cuda:{} ({name}, compute capability {major}.{minor})", self.ordinal)
    }

    fn multiprocessors(&self) -> u32 {
        self.attribute(CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT).unwrap_or(1)
    }

    fn resident_blocks(&self, kernel: &str, block: u32, shared_bytes: u32) -> Result<u32> {
        let function = self.kernel(kernel, shared_bytes)?;
        let each = function.occupancy_max_active_blocks_per_multiprocessor(block, shared_bytes as usize, None);
        let each = each.map_err(|error| self.failed(&format!("tell how many blocks of {kernel} fit"), error))?;
        Ok(each.max(1) * self.multiprocessors())
    }

    fn room(&self) -> Result<(usize, usize)> {
        self.stream.context().mem_get_info().map_err(|error| self.failed("ask for its free memory", error))
    }

    fn allocate(&self, bytes: usize, place: Place) -> Result<Memory> {
        self.bind()?;
        let size = bytes.max(1); // the driver refuses empty allocations
        // SAFETY: freed once, by Memory; used on this device's stream only.
        let pointer = unsafe {
            match place {
                Place::Device if self.stream.context().has_async_alloc() => result::malloc_async(self.stream.cu_stream(), size),
                Place::Device => result::malloc_sync(size),
                // page-locked memory has one address for host and device
                Place::Host => result::malloc_host(size, sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP)
                    .map(|pointer| pointer as CUdeviceptr),
            }
        };
        let pointer = pointer.map_err(|error| self.no_room(bytes, place, error))?;
        Ok(Memory { pointer, len: bytes, place, stream: self.stream.clone() })
    }

    fn write_bytes(&self, to: &Memory, at: usize, from: &[u8]) -> Result<()> {
        within(to.len, at, from.len())?;
        self.transfer(from.as_ptr() as CUdeviceptr, to.pointer + at as CUdeviceptr, from.len())
    }

    fn read_bytes(&self, from: &Memory, at: usize, to: &mut [u8]) -> Result<()> {
        within(from.len, at, to.len())?;
        self.transfer(from.pointer + at as CUdeviceptr, to.as_mut_ptr() as CUdeviceptr, to.len())?;
        self.synchronize()
    }

    fn copy_bytes(&self, from: &Memory, from_at: usize, to: &Memory, to_at: usize, bytes: usize) -> Result<()> {
        within(from.len, from_at, bytes)?;
        within(to.len, to_at, bytes)?;
        self.transfer(from.pointer + from_at as CUdeviceptr, to.pointer + to_at as CUdeviceptr, bytes)
    }

    fn fill_bytes(&self, to: &Memory, at: usize, bytes: usize, value: u8) -> Result<()> {
        within(to.len, at, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the range lies within the allocation.
        let filled = unsafe { result::memset_d8_async(to.pointer + at as CUdeviceptr, value, bytes, self.stream.cu_stream()) };
        filled.map_err(|error| self.failed("fill memory", error))
    }

    fn launch(&self, kernel: &str, grid: [u32; 3], block: [u32; 3], shared_bytes: u32, args: &[Arg<'_, Self>]) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        let function = self.kernel(kernel, shared_bytes)?;
        let values = args.iter().map(value).collect::<Result<Vec<u64>>>()?;
        let mut builder = self.stream.launch_builder(&function);
        for value in &values {
            builder.arg(value); // little-endian: the driver reads as many of the 8 bytes as the parameter has
        }
        let (grid_dim, block_dim) = (grid.into(), block.into());
        // SAFETY: the arguments are those of the kernel, as every launch is tested under emulation; kernels stay within their buffers.
        let launched = unsafe { builder.launch(LaunchConfig { grid_dim, block_dim, shared_mem_bytes: shared_bytes }) };
        launched.map(|_| ()).map_err(|error| {
            let shape = format!("grid {grid:?}, block {block:?}, {shared_bytes} shared bytes");
            defect(format!("kernel {kernel} ({shape}): {error}"))
        })
    }

    fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().map_err(|error| self.failed("finish what it was asked for", error))
    }
}

impl Cuda {
    fn no_room(&self, bytes: usize, place: Place, error: DriverError) -> Error {
        if error.0 != CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return self.failed("allocate memory", error);
        }
        let (free, all) = self.room().unwrap_or_default();
        let mebibytes = |bytes: usize| bytes >> 20;
        let cause = match place {
            Place::Device => format!("no room for {} MiB: {} of {} MiB are free", mebibytes(bytes), mebibytes(free), mebibytes(all)),
            Place::Host => format!("no room for {} MiB of page-locked host memory", mebibytes(bytes)),
        };
        Error::input(format!("device cuda:{}", self.ordinal), cause).fix("take a shorter context or a smaller cache format")
    }
}

/// The argument as 8 bytes.
fn value(arg: &Arg<'_, Cuda>) -> Result<u64> {
    Ok(match arg {
        Arg::Memory { memory, at, .. } => {
            within(memory.len, *at, 0)?;
            memory.pointer + *at as CUdeviceptr
        }
        Arg::Null => 0,
        Arg::U32(value) => u64::from(*value),
        Arg::I32(value) => u64::from(value.cast_unsigned()),
        Arg::U64(value) => *value,
        Arg::F32(value) => u64::from(value.to_bits()),
    })
}

impl Drop for Memory {
    fn drop(&mut self) {
        let context = self.stream.context();
        context.record_err(context.bind_to_thread());
        // SAFETY: allocated by `allocate` in the same way; what still uses the memory was asked for before on the same stream, and host
        // memory is freed when the stream is done with it.
        let freed = unsafe {
            match self.place {
                Place::Device if context.has_async_alloc() => result::free_async(self.pointer, self.stream.cu_stream()),
                Place::Device => result::free_sync(self.pointer),
                Place::Host => {
                    context.record_err(self.stream.synchronize());
                    result::free_host(self.pointer as *mut _)
                }
            }
        };
        context.record_err(freed);
    }
}
