//! What shim.h declares, and status + message → [`Error`]. The only `extern "C"` of ours.

use std::ffi::{CStr, c_char, c_int, c_void};

use llama_cpp_sys_2::{llama_model, llama_vocab};

use crate::error::{Error, Result};

/// Of llama.cpp's `llama_decode`, and of the shim when something was thrown.
pub(crate) const DECODE_NO_ROOM: c_int = 1;
pub(crate) const DECODE_ABORTED: c_int = 2;

const THROWN: c_int = -100;
const NO_MEMORY: c_int = -101;
const REFUSED: c_int = -102;

#[repr(C)]
pub(crate) struct ShimError {
    message: [c_char; 512],
}

#[repr(C)]
pub(crate) struct ShimContext {
    _opaque: [u8; 0],
}

#[repr(C)]
pub(crate) struct ShimSampler {
    pub name: *const c_char,
    pub values: [f32; 4],
    pub strings: *const *const c_char,
    pub n_strings: usize,
}

#[repr(C)]
pub(crate) struct ContextParams {
    pub n_ctx: u32,
    pub n_batch: u32,
    pub n_ubatch: u32,
    pub n_seq_max: u32,
    pub n_outputs_max: u32,
    pub n_threads: i32,
    pub flash_attn: i32,
    pub kv_type: i32,
    pub poll: u32,
    pub kv_unified: bool,
    pub offload_kqv: bool,
    pub abort: Option<unsafe extern "C" fn(*mut c_void) -> bool>,
    pub abort_data: *mut c_void,
}

unsafe extern "C" {
    pub(crate) fn ta_context_new(
        model: *mut llama_model,
        params: *const ContextParams,
        out: *mut *mut ShimContext,
        error: *mut ShimError,
    ) -> c_int;
    pub(crate) fn ta_context_free(context: *mut ShimContext);
    pub(crate) fn ta_context_set_threads(context: *mut ShimContext, n_threads: i32);
    pub(crate) fn ta_context_n_ctx_seq(context: *const ShimContext) -> u32;
    pub(crate) fn ta_context_n_batch(context: *const ShimContext) -> u32;
    pub(crate) fn ta_context_n_seq_max(context: *const ShimContext) -> u32;
    pub(crate) fn ta_batch_clear(context: *mut ShimContext);
    pub(crate) fn ta_batch_add(
        context: *mut ShimContext,
        token: i32,
        position: i32,
        sequence: i32,
        want_logits: bool,
    );
    pub(crate) fn ta_decode(context: *mut ShimContext, error: *mut ShimError) -> c_int;
    pub(crate) fn ta_logits(
        context: *mut ShimContext,
        row: i32,
        out: *mut *const f32,
        error: *mut ShimError,
    ) -> c_int;
    pub(crate) fn ta_sequence_remove(
        context: *mut ShimContext,
        sequence: i32,
        from: i32,
        to: i32,
    ) -> bool;
    pub(crate) fn ta_sequence_copy(context: *mut ShimContext, from: i32, to: i32) -> bool;
    pub(crate) fn ta_memory_clear(context: *mut ShimContext);
    pub(crate) fn ta_tokenize(
        vocab: *const llama_vocab,
        text: *const c_char,
        length: i32,
        out: *mut i32,
        capacity: i32,
        add_special: bool,
        parse_special: bool,
        count: *mut i32,
        error: *mut ShimError,
    ) -> c_int;
    pub(crate) fn ta_piece(
        vocab: *const llama_vocab,
        token: i32,
        out: *mut c_char,
        capacity: i32,
        special: bool,
        length: *mut i32,
        error: *mut ShimError,
    ) -> c_int;
    pub(crate) fn ta_vocab_scan(
        vocab: *const llama_vocab,
        ends_generation: *mut u8,
        n_tokens: i32,
        longest_piece: *mut i32,
        error: *mut ShimError,
    ) -> c_int;
    fn ta_backend_load(path: *const c_char, error: *mut ShimError) -> c_int;
    fn ta_probe_cpu(error: *mut ShimError) -> c_int;
    pub(crate) fn ta_samplers_apply(
        vocab: *const llama_vocab,
        samplers: *const ShimSampler,
        n_samplers: i32,
        history: *const i32,
        n_history: i32,
        rows: *const f32,
        n_rows: i32,
        n_vocab: i32,
        tokens: *mut i32,
        probabilities: *mut f64,
        n_left: *mut i32,
        error: *mut ShimError,
    ) -> c_int;
    fn ta_throw(error: *mut ShimError) -> c_int;
}

/// Calls the shim; a thrown exception comes back as an error, every other status as a value.
pub(crate) fn call(function: impl FnOnce(*mut ShimError) -> c_int) -> Result<c_int> {
    let mut error = ShimError { message: [0; 512] };
    let status = function(&mut error);
    // SAFETY: the shim ends every message with a zero, and the array began as zeros.
    let message = || unsafe { CStr::from_ptr(error.message.as_ptr()) }.to_string_lossy();
    match status {
        THROWN => Err(Error::internal(format!("llama.cpp threw: {}", message()))),
        NO_MEMORY => Err(Error::internal("llama.cpp ran out of memory")),
        REFUSED => Err(Error::internal(message())),
        status => Ok(status),
    }
}

pub(crate) fn load_backend(path: &CStr) -> Result<()> {
    // SAFETY: a zero-terminated string that outlives the call.
    call(|error| unsafe { ta_backend_load(path.as_ptr(), error) }).map(drop)
}

pub(crate) fn probe_cpu() -> Result<()> {
    // SAFETY: no arguments of ours.
    call(|error| unsafe { ta_probe_cpu(error) }).map(drop)
}

/// For tests: a C++ exception that must come back as an error.
pub fn throw() -> Result<()> {
    // SAFETY: no arguments of ours.
    call(|error| unsafe { ta_throw(error) }).map(drop)
}
