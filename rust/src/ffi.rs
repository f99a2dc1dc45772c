//! What shim.h declares, and status + message → [`Error`]. The only `extern "C"` of ours.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::time::Duration;

use llama_cpp_sys_2::{llama_model, llama_model_params, llama_vocab};

use crate::error::{Error, Result};

/// Of llama.cpp's `llama_decode`, and of the shim when something was thrown.
pub(crate) const DECODE_EXHAUSTED: c_int = -2;
pub(crate) const DECODE_REFUSED: c_int = -1;
pub(crate) const DECODE_NO_ROOM: c_int = 1;
pub(crate) const DECODE_ABORTED: c_int = 2;

/// What else there is to know of a prompt, and the parts of an answer.
pub(crate) const PROMPT_STOP: c_int = 0;
pub(crate) const PROMPT_PRESERVED: c_int = 1;
pub(crate) const PROMPT_THINKING: c_int = 2;
pub(crate) const PROMPT_GRAMMAR: c_int = 3;
pub(crate) const PROMPT_GRAMMAR_PREFIX: c_int = 4;
pub(crate) const PROMPT_TRIGGER_WORD: c_int = 5;
pub(crate) const PROMPT_TRIGGER_PATTERN: c_int = 6;
pub(crate) const PROMPT_TRIGGER_PATTERN_FULL: c_int = 7;
pub(crate) const ANSWER_CONTENT: c_int = 0;
pub(crate) const ANSWER_REASONING: c_int = 1;
pub(crate) const ANSWER_CALL_ID: c_int = 2;
pub(crate) const ANSWER_CALL_NAME: c_int = 3;
pub(crate) const ANSWER_CALL_ARGUMENTS: c_int = 4;

const THROWN: c_int = -100;
const NO_MEMORY: c_int = -101;
const REFUSED: c_int = -102;
const EXHAUSTED: c_int = -103;

#[repr(C)]
pub(crate) struct ShimError {
    message: [c_char; 512],
}

#[repr(C)]
pub(crate) struct ShimContext {
    _opaque: [u8; 0],
}

#[repr(C)]
pub(crate) struct ShimChat {
    _opaque: [u8; 0],
}

#[repr(C)]
pub(crate) struct ShimPrompt {
    _opaque: [u8; 0],
}

#[repr(C)]
pub(crate) struct ShimChatOptions {
    _opaque: [u8; 0],
}

#[repr(C)]
pub(crate) struct ShimReader {
    _opaque: [u8; 0],
}

#[repr(C)]
pub(crate) struct ShimAnswer {
    _opaque: [u8; 0],
}

#[repr(C)]
pub(crate) struct ShimPool {
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
    pub pool: *mut ShimPool,
    pub kv_unified: bool,
    pub offload_kqv: bool,
    pub abort: Option<unsafe extern "C" fn(*mut c_void) -> bool>,
    pub abort_data: *mut c_void,
}

#[repr(C)]
struct ShimMemory {
    device: [c_char; 64],
    in_ram: bool,
    is_mapped: bool,
    weights: u64,
    context: u64,
    compute: u64,
}

/// One kind of memory, and what llama.cpp allocated of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// As llama.cpp calls it: `CPU`, `CUDA0`.
    pub device: String,
    pub in_ram: bool,
    /// Pages of the model file, which the kernel may drop and read again.
    pub is_mapped: bool,
    pub weights: u64,
    /// Keys and values, and the states of recurrent layers.
    pub context: u64,
    pub compute: u64,
}

#[repr(C)]
pub(crate) struct ShimAttention {
    _opaque: [u8; 0],
}

#[repr(C)]
pub(crate) struct AttentionShape {
    pub head_dim: i32,
    pub n_head: i32,
    pub n_head_kv: i32,
    pub n_ctx: i32,
}

#[repr(C)]
pub(crate) struct AttentionCase {
    pub flash_attn: bool,
    pub kv_type: i32,
    pub rows: i32,
    pub n_kv: i32,
}

#[repr(C)]
pub(crate) struct ShimLayouts {
    _opaque: [u8; 0],
}

unsafe extern "C" {
    pub(crate) fn ta_thread_computes(does: bool);
    pub(crate) fn ta_pool_new(
        n_threads: i32,
        poll: u32,
        out: *mut *mut ShimPool,
        error: *mut ShimError,
    ) -> c_int;
    pub(crate) fn ta_pool_free(pool: *mut ShimPool);
    pub(crate) fn ta_context_new(
        model: *mut llama_model,
        params: *const ContextParams,
        out: *mut *mut ShimContext,
        error: *mut ShimError,
    ) -> c_int;
    pub(crate) fn ta_context_free(context: *mut ShimContext);
    pub(crate) fn ta_context_set_threads(
        context: *mut ShimContext,
        pool: *mut ShimPool,
        n_threads: i32,
    );
    pub(crate) fn ta_context_n_ctx_seq(context: *const ShimContext) -> u32;
    pub(crate) fn ta_context_n_batch(context: *const ShimContext) -> u32;
    pub(crate) fn ta_context_n_seq_max(context: *const ShimContext) -> u32;
    fn ta_context_memory(
        context: *const ShimContext,
        index: i32,
        out: *mut ShimMemory,
        error: *mut ShimError,
    ) -> c_int;
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
    pub(crate) fn ta_can_shift(context: *const ShimContext) -> bool;
    pub(crate) fn ta_sequence_shift(
        context: *mut ShimContext,
        sequence: i32,
        keep: i32,
        drop: i32,
    ) -> bool;
    pub(crate) fn ta_sequence_first(context: *mut ShimContext, sequence: i32) -> i32;
    pub(crate) fn ta_sequence_last(context: *mut ShimContext, sequence: i32) -> i32;
    pub(crate) fn ta_sequence_copy(context: *mut ShimContext, from: i32, to: i32) -> bool;
    pub(crate) fn ta_sequence_state_size(context: *mut ShimContext, sequence: i32) -> usize;
    pub(crate) fn ta_sequence_state_get(
        context: *mut ShimContext,
        sequence: i32,
        out: *mut u8,
        size: usize,
    ) -> usize;
    pub(crate) fn ta_sequence_state_set(
        context: *mut ShimContext,
        sequence: i32,
        state: *const u8,
        size: usize,
    ) -> usize;
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
    pub(crate) fn ta_chat_new(
        model: *const llama_model,
        source: *const c_char,
        length: usize,
        out: *mut *mut ShimChat,
        error: *mut ShimError,
    ) -> c_int;
    pub(crate) fn ta_chat_free(chat: *mut ShimChat);
    pub(crate) fn ta_chat_options_new(
        json: *const c_char,
        length: usize,
        out: *mut *mut ShimChatOptions,
        error: *mut ShimError,
    ) -> c_int;
    pub(crate) fn ta_chat_options_free(options: *mut ShimChatOptions);
    pub(crate) fn ta_chat_options_have_tools(options: *const ShimChatOptions) -> bool;
    pub(crate) fn ta_chat_apply(
        chat: *const ShimChat,
        options: *const ShimChatOptions,
        messages: *const c_char,
        length: usize,
        add_generation_prompt: bool,
        out: *mut *mut ShimPrompt,
        error: *mut ShimError,
    ) -> c_int;
    pub(crate) fn ta_prompt_free(prompt: *mut ShimPrompt);
    pub(crate) fn ta_prompt_piece(
        prompt: *const ShimPrompt,
        index: usize,
        text: *mut *const c_char,
        length: *mut usize,
        is_input: *mut bool,
    ) -> bool;
    pub(crate) fn ta_prompt_text(
        prompt: *const ShimPrompt,
        what: c_int,
        index: usize,
        text: *mut *const c_char,
        length: *mut usize,
    ) -> bool;
    pub(crate) fn ta_prompt_grammar_is_lazy(prompt: *const ShimPrompt) -> bool;
    pub(crate) fn ta_prompt_is_thinking(prompt: *const ShimPrompt) -> bool;
    pub(crate) fn ta_prompt_take_reader(prompt: *mut ShimPrompt) -> *mut ShimReader;
    pub(crate) fn ta_reader_free(reader: *mut ShimReader);
    pub(crate) fn ta_reader_read(
        reader: *const ShimReader,
        text: *const c_char,
        length: usize,
        is_partial: bool,
        out: *mut *mut ShimAnswer,
        error: *mut ShimError,
    ) -> c_int;
    pub(crate) fn ta_answer_free(answer: *mut ShimAnswer);
    pub(crate) fn ta_answer_is_whole(answer: *const ShimAnswer) -> bool;
    pub(crate) fn ta_answer_text(
        answer: *const ShimAnswer,
        what: c_int,
        index: usize,
        text: *mut *const c_char,
        length: *mut usize,
    ) -> bool;
    pub(crate) fn ta_attention_new(
        shape: *const AttentionShape,
        n_threads: i32,
        out: *mut *mut ShimAttention,
        error: *mut ShimError,
    ) -> c_int;
    pub(crate) fn ta_attention_free(attention: *mut ShimAttention);
    pub(crate) fn ta_attention_time(
        attention: *mut ShimAttention,
        case: *const AttentionCase,
        seconds: *mut f64,
        error: *mut ShimError,
    ) -> c_int;
    pub(crate) fn ta_layouts_new(
        types: *const i32,
        n_types: i32,
        n_threads: i32,
        out: *mut *mut ShimLayouts,
        error: *mut ShimError,
    ) -> c_int;
    pub(crate) fn ta_layouts_free(layouts: *mut ShimLayouts);
    pub(crate) fn ta_layouts_time(
        layouts: *mut ShimLayouts,
        place: i32,
        anew: bool,
        rows: i32,
        seconds: *mut f64,
        error: *mut ShimError,
    ) -> c_int;
    fn ta_cpu_has(feature: *const c_char, error: *mut ShimError) -> c_int;
    fn ta_cpu_seconds() -> f64;
    fn ta_backend_load(path: *const c_char, error: *mut ShimError) -> c_int;
    fn ta_module_score(
        ask: unsafe extern "C" fn() -> c_int,
        score: *mut c_int,
        error: *mut ShimError,
    ) -> c_int;
    fn ta_model_load(
        path: *const c_char,
        params: *const llama_model_params,
        out: *mut *mut llama_model,
        error: *mut ShimError,
    ) -> c_int;
    fn ta_forget_mapped(model: *const llama_model, error: *mut ShimError) -> c_int;
    fn ta_attend(asked: *const Attended, off: *mut f64, error: *mut ShimError) -> c_int;
    fn ta_relaid(kind: i32, factor: *mut f64, error: *mut ShimError) -> c_int;
    fn ta_probe_cpu(error: *mut ShimError) -> c_int;
    fn ta_multiply(
        kind: i32,
        layout: i32,
        asked: *const Product,
        found: *mut ProductFound,
        error: *mut ShimError,
    ) -> c_int;
    fn ta_probe_gpus(error: *mut ShimError) -> c_int;
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
    pub(crate) fn ta_grammar_try(
        grammar: *const c_char,
        text: *const c_char,
        verdict: *mut c_int,
        error: *mut ShimError,
    ) -> c_int;
    fn ta_throw(error: *mut ShimError) -> c_int;
}

/// Calls the shim; a thrown exception comes back as an error, every other status as a value.
pub(crate) fn call(function: impl FnOnce(*mut ShimError) -> c_int) -> Result<c_int> {
    call_or(Error::internal, function)
}

/// The same, where a refusal is no fault of ours: `refusal` makes the error of its message.
pub(crate) fn call_or(
    refusal: impl FnOnce(String) -> Error,
    function: impl FnOnce(*mut ShimError) -> c_int,
) -> Result<c_int> {
    let mut error = ShimError { message: [0; 512] };
    let status = function(&mut error);
    // SAFETY: the shim ends every message with a zero, and the array began as zeros.
    let message = || unsafe { CStr::from_ptr(error.message.as_ptr()) }.to_string_lossy();
    match status {
        THROWN => Err(Error::internal(format!("llama.cpp threw: {}", message()))),
        NO_MEMORY => Err(Error::exhausted("memory to llama.cpp")),
        REFUSED => Err(refusal(message().into_owned())),
        EXHAUSTED => Err(Error::exhausted(message())),
        status => Ok(status),
    }
}

pub(crate) fn load_backend(path: &CStr) -> Result<()> {
    // SAFETY: a zero-terminated string that outlives the call.
    call(|error| unsafe { ta_backend_load(path.as_ptr(), error) }).map(drop)
}

/// # Safety
/// The function is a module's, which stays loaded meanwhile.
pub(crate) unsafe fn module_score(ask: unsafe extern "C" fn() -> c_int) -> Result<i32> {
    let mut score = 0;
    // SAFETY: as this function demands.
    call(|error| unsafe { ta_module_score(ask, &mut score, error) })?;
    Ok(score)
}

/// NULL where llama.cpp's log says why not.
///
/// # Safety
/// The backend has started, and what the parameters point to outlives the call.
pub(crate) unsafe fn load_model(
    path: &CStr,
    params: &llama_model_params,
) -> Result<*mut llama_model> {
    let mut model = std::ptr::null_mut();
    // SAFETY: as this function demands.
    call(|error| unsafe { ta_model_load(path.as_ptr(), params, &mut model, error) })?;
    Ok(model)
}

pub(crate) fn probe_cpu() -> Result<()> {
    // SAFETY: no arguments of ours.
    call(|error| unsafe { ta_probe_cpu(error) }).map(drop)
}

pub(crate) fn probe_gpus() -> Result<()> {
    // SAFETY: no arguments of ours.
    call_or(|what| Error::Hardware { what }, |error| unsafe { ta_probe_gpus(error) }).map(drop)
}

/// # Safety
/// The context is alive, and nothing else uses it meanwhile.
pub(crate) unsafe fn memory(context: *const ShimContext) -> Result<Vec<MemoryUse>> {
    let mut all = Vec::new();
    loop {
        // SAFETY: plain numbers and bytes; all of them may be zero.
        let mut found: ShimMemory = unsafe { std::mem::zeroed() };
        let index = all.len() as i32;
        // SAFETY: as this function demands.
        let status = call(|error| unsafe { ta_context_memory(context, index, &mut found, error) })?;
        if status != 0 {
            return Ok(all);
        }
        // SAFETY: the shim ends the name with a zero.
        let device = unsafe { CStr::from_ptr(found.device.as_ptr()) };
        all.push(MemoryUse {
            device: device.to_string_lossy().into_owned(),
            in_ram: found.in_ram,
            is_mapped: found.is_mapped,
            weights: found.weights,
            context: found.context,
            compute: found.compute,
        });
    }
}

/// One product of a matrix, or of two out of so many `experts`, with `batch` rows of input.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Product {
    pub columns: i64,
    pub rows: i64,
    pub batch: i64,
    pub experts: i64,
    pub times: i32,
    pub threads: i32,
}

/// The largest error, as a part of the largest number, and the least time.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ProductFound {
    pub error: f64,
    pub seconds: f64,
}

/// Multiplies on the CPU module that is loaded, with the weights as in a file (0), or in the first,
/// second, … of its own layouts. None: that layout does not take such weights.
pub fn multiply(kind: u32, layout: u32, asked: Product) -> Result<Option<ProductFound>> {
    let mut found = ProductFound::default();
    // SAFETY: two structs that outlive the call.
    let status = call(|error| unsafe {
        ta_multiply(kind as i32, layout as i32, &asked, &mut found, error)
    })?;
    Ok((status == 1).then_some(found))
}

/// Flash attention over a cache of f16, with numbers that look like chance.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Attended {
    pub dim: i32,
    pub n_head: i32,
    pub n_head_kv: i32,
    pub n_tokens: i32,
    pub n_cells: i32,
    pub n_streams: i32,
    pub threads: i32,
    /// Else each token sees cells here and there, and the first of several none.
    pub is_causal: bool,
    pub has_sinks: bool,
    pub max_bias: f32,
}

/// How far it is from the same in double precision, as a part of the largest number.
pub fn attend(asked: Attended) -> Result<f64> {
    let mut off = f64::NAN;
    // SAFETY: a struct and a number that outlive the call.
    call(|error| unsafe { ta_attend(&asked, &mut off, error) })?;
    Ok(off)
}

/// Take what is mapped of the file out of this process where most of it was copied elsewhere.
pub(crate) fn forget_mapped(model: *const llama_model) {
    // SAFETY: a model that is loaded, and whose file is mapped to be read only. If it fails, the
    // memory is only counted twice.
    let _ = call(|error| unsafe { ta_forget_mapped(model, error) });
}

/// Into how many bytes the CPU module that is loaded lays a byte of weights of a type out anew; None
/// where it leaves them as they are.
pub(crate) fn relaid(kind: u32) -> Option<f64> {
    let mut factor = 0.0;
    // SAFETY: a number to write to that outlives the call.
    call(|error| unsafe { ta_relaid(kind as i32, &mut factor, error) }).ok()?;
    (factor > 0.0).then_some(factor)
}

/// Whether the CPU module that is loaded uses this feature of the processor.
pub(crate) fn cpu_has(feature: &CStr) -> bool {
    // SAFETY: a zero-terminated string that outlives the call.
    call(|error| unsafe { ta_cpu_has(feature.as_ptr(), error) }).is_ok_and(|found| found == 1)
}

/// What all threads of this process have computed so far.
pub(crate) fn cpu_time() -> Duration {
    // SAFETY: no arguments.
    Duration::from_secs_f64(unsafe { ta_cpu_seconds() }.max(0.0))
}

/// For tests: a C++ exception that must come back as an error.
pub fn throw() -> Result<()> {
    // SAFETY: no arguments of ours.
    call(|error| unsafe { ta_throw(error) }).map(drop)
}
