// The C side of the border: the calls of llama.cpp that can throw, each behind a function that
// cannot. What can abort instead is checked in Rust before it comes here.
//
// Every function that takes a `ta_error *` returns TA_OK, a status of llama.cpp's own where that
// is said, or TA_THROWN / TA_NO_MEMORY with the message of what was thrown. rust/src/ffi.rs
// declares the same functions; the two files change together.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
#define TA_NOEXCEPT noexcept
extern "C" {
#else
#define TA_NOEXCEPT
#endif

enum {
    TA_OK        = 0,
    TA_THROWN    = -100,
    TA_NO_MEMORY = -101,
    TA_REFUSED   = -102,  // a NULL or false where llama.cpp gives no reason
    TA_EXHAUSTED = -103,  // the system refuses what the message names
};

typedef struct ta_error {
    char message[512];
} ta_error;

struct llama_model;
struct llama_model_params;
struct llama_vocab;

// Threads to compute on. One context at a time uses them; a pool outlives its contexts.
typedef struct ta_pool ta_pool;

// Lets the calling thread, and those it creates, give its core at once to whoever wakes up and has
// little to do: it asks the kernel for long slices, and whoever has shorter ones goes first. Its share
// of the core stays the same. Only on Linux from 6.12 on; elsewhere it does nothing.
void ta_thread_computes(bool does) TA_NOEXCEPT;

// `poll` is how long idle workers spin: 0 to 100.
int  ta_pool_new(int32_t n_threads, uint32_t poll, ta_pool ** out, ta_error * error) TA_NOEXCEPT;
void ta_pool_free(ta_pool * pool) TA_NOEXCEPT;

// A llama_context, and the batch that is being built for it.
typedef struct ta_context ta_context;

typedef struct ta_context_params {
    uint32_t n_ctx;      // of all sequences together
    uint32_t n_batch;
    uint32_t n_ubatch;
    uint32_t n_seq_max;
    uint32_t n_outputs_max;
    int32_t  n_threads;
    int32_t  flash_attn;  // -1 auto, 0 off, 1 on
    int32_t  kv_type;     // a ggml_type
    ta_pool * pool;       // NULL with a single thread
    bool     kv_unified;
    bool     offload_kqv;
    // Asked after each node of the graph on the CPU; true ends the decode with status 2.
    bool (*abort)(void * data);
    void * abort_data;
} ta_context_params;

int  ta_context_new(struct llama_model * model, const ta_context_params * params, ta_context ** out,
                    ta_error * error) TA_NOEXCEPT;
void ta_context_free(ta_context * context) TA_NOEXCEPT;

// At most as many as the pool has; without one, one. Nobody computes on either pool meanwhile, since the one
// that is left is told to pause.
void ta_context_set_threads(ta_context * context, const ta_pool * pool, int32_t n_threads) TA_NOEXCEPT;

// Sizes as llama.cpp rounded them.
uint32_t ta_context_n_ctx_seq(const ta_context * context) TA_NOEXCEPT;
uint32_t ta_context_n_batch(const ta_context * context) TA_NOEXCEPT;
uint32_t ta_context_n_seq_max(const ta_context * context) TA_NOEXCEPT;

// What llama.cpp allocated, one kind of memory per call. 1 behind the last one.
typedef struct ta_memory {
    char     device[64];  // as llama.cpp calls it: CPU, CUDA0, ...
    bool     in_ram;
    bool     is_mapped;   // pages of the model file, which the kernel may drop and read again
    uint64_t weights;     // of the model, whichever context asks
    uint64_t context;     // keys and values, and states
    uint64_t compute;
} ta_memory;

int ta_context_memory(const ta_context * context, int32_t index, ta_memory * out,
                      ta_error * error) TA_NOEXCEPT;

// One row of a batch per call; the caller keeps to n_batch rows and valid ids.
void ta_batch_clear(ta_context * context) TA_NOEXCEPT;
void ta_batch_add(ta_context * context, int32_t token, int32_t position, int32_t sequence,
                  bool want_logits) TA_NOEXCEPT;

// 0 done, 1 no room, 2 aborted, -1 bad batch, -2 allocation failed, -3 compute failed.
int ta_decode(ta_context * context, ta_error * error) TA_NOEXCEPT;

// The logits of one row of the last batch; NULL for a row that did not want them.
int ta_logits(ta_context * context, int32_t row, const float ** out, ta_error * error) TA_NOEXCEPT;

// False: this kind of memory cannot forget a part of a sequence.
bool ta_sequence_remove(ta_context * context, int32_t sequence, int32_t from, int32_t to) TA_NOEXCEPT;
// Whether the positions of a sequence can be moved.
bool ta_can_shift(const ta_context * context) TA_NOEXCEPT;
// Forgets `drop` positions after the first `keep`, and moves the rest up. Only where it can shift.
bool ta_sequence_shift(ta_context * context, int32_t sequence, int32_t keep, int32_t drop) TA_NOEXCEPT;

// The first position that a sequence holds everything of, -1 if it holds nothing.
int32_t ta_sequence_first(ta_context * context, int32_t sequence) TA_NOEXCEPT;
// The last one, -1 if it holds nothing.
int32_t ta_sequence_last(ta_context * context, int32_t sequence) TA_NOEXCEPT;
// Makes `to` hold what `from` holds, all of it, with the next decode; `to` loses what it held.
bool ta_sequence_copy(ta_context * context, int32_t from, int32_t to) TA_NOEXCEPT;

// What a sequence holds, as bytes: how many, and the bytes themselves. 0 when that failed.
size_t ta_sequence_state_size(ta_context * context, int32_t sequence) TA_NOEXCEPT;
size_t ta_sequence_state_get(ta_context * context, int32_t sequence, uint8_t * out, size_t size) TA_NOEXCEPT;
// Replaces what the sequence holds; 0 when that failed, and then it holds nothing.
size_t ta_sequence_state_set(ta_context * context, int32_t sequence, const uint8_t * state,
                             size_t size) TA_NOEXCEPT;
void ta_memory_clear(ta_context * context) TA_NOEXCEPT;

// The number of tokens written, or minus the number that there is no room for.
int ta_tokenize(const struct llama_vocab * vocab, const char * text, int32_t length, int32_t * out,
                int32_t capacity, bool add_special, bool parse_special, int32_t * count,
                ta_error * error) TA_NOEXCEPT;
int ta_piece(const struct llama_vocab * vocab, int32_t token, char * out, int32_t capacity,
             bool special, int32_t * length, ta_error * error) TA_NOEXCEPT;

// One pass over the vocabulary: which tokens end a generation, and the longest piece in bytes.
int ta_vocab_scan(const struct llama_vocab * vocab, uint8_t * ends_generation, int32_t n_tokens,
                  int32_t * longest_piece, ta_error * error) TA_NOEXCEPT;

// A chat template, parsed and with limits on what it may do. `source` is its text. TA_REFUSED, here
// and below: the template is wrong, or the messages are not what it takes; the message says why.
// Templates recurse: call these on a thread with a stack of 256 MiB, and one at a time.
typedef struct ta_chat ta_chat;
int  ta_chat_new(const struct llama_model * model, const char * source, size_t length, ta_chat ** out,
                 ta_error * error) TA_NOEXCEPT;
void ta_chat_free(ta_chat * chat) TA_NOEXCEPT;

// How conversations are written out: JSON text of an object with `tools`, `tool_choice`,
// `parallel_tool_calls`, `enable_thinking`, `reasoning_format`, `chat_template_kwargs` and
// `continue_final_message`, each as llama-server has it, and none of them needed. TA_REFUSED: the
// message says what was given that it must not be. Calls recurse over the JSON.
typedef struct ta_chat_options ta_chat_options;
int  ta_chat_options_new(const char * json, size_t length, ta_chat_options ** out,
                         ta_error * error) TA_NOEXCEPT;
void ta_chat_options_free(ta_chat_options * options) TA_NOEXCEPT;
bool ta_chat_options_have_tools(const ta_chat_options * options) TA_NOEXCEPT;

// A conversation as a prompt. `messages` is the JSON text of a list of messages as OpenAI has them.
typedef struct ta_prompt ta_prompt;
int  ta_chat_apply(const ta_chat * chat, const ta_chat_options * options, const char * messages,
                   size_t length, bool add_generation_prompt, ta_prompt ** out,
                   ta_error * error) TA_NOEXCEPT;
void ta_prompt_free(ta_prompt * prompt) TA_NOEXCEPT;
// The pieces of the prompt in order, and whether they came from messages or from the template. False
// behind the last one, here and below. Texts live as long as the prompt.
bool ta_prompt_piece(const ta_prompt * prompt, size_t index, const char ** text, size_t * length,
                     bool * is_input) TA_NOEXCEPT;

// What else there is to know of a prompt.
enum {
    TA_PROMPT_STOP,            // strings that end an answer
    TA_PROMPT_PRESERVED,       // control tokens that are part of the answer's text
    TA_PROMPT_THINKING,        // the tags before and behind what the model thinks: two or none
    TA_PROMPT_GRAMMAR,         // GBNF: one or none
    TA_PROMPT_GRAMMAR_PREFIX,  // what of the grammar's text stands in the prompt already
    TA_PROMPT_TRIGGER_WORD,    // what a lazy grammar waits for
    TA_PROMPT_TRIGGER_PATTERN,
    TA_PROMPT_TRIGGER_PATTERN_FULL,
};
bool ta_prompt_text(const ta_prompt * prompt, int what, size_t index, const char ** text,
                    size_t * length) TA_NOEXCEPT;
bool ta_prompt_grammar_is_lazy(const ta_prompt * prompt) TA_NOEXCEPT;
bool ta_prompt_is_thinking(const ta_prompt * prompt) TA_NOEXCEPT;  // it ends between the tags

// What reads the answers to a prompt; the caller has it from then on. NULL: an answer is content and
// nothing else. Any thread may use it.
typedef struct ta_reader ta_reader;
ta_reader * ta_prompt_take_reader(ta_prompt * prompt) TA_NOEXCEPT;
void        ta_reader_free(ta_reader * reader) TA_NOEXCEPT;

// An answer, or the beginning of one. TA_REFUSED: it is not what the template wants, and complete.
// It recurses where the answer is nested.
typedef struct ta_answer ta_answer;
int  ta_reader_read(const ta_reader * reader, const char * text, size_t length, bool is_partial,
                    ta_answer ** out, ta_error * error) TA_NOEXCEPT;
void ta_answer_free(ta_answer * answer) TA_NOEXCEPT;
// False: it could go on, or it ends in the middle of something.
bool ta_answer_is_whole(const ta_answer * answer) TA_NOEXCEPT;
enum {
    TA_ANSWER_CONTENT,  // one each
    TA_ANSWER_REASONING,
    TA_ANSWER_CALL_ID,  // one for each tool call
    TA_ANSWER_CALL_NAME,
    TA_ANSWER_CALL_ARGUMENTS,
};
bool ta_answer_text(const ta_answer * answer, int what, size_t index, const char ** text,
                    size_t * length) TA_NOEXCEPT;

// Takes what is mapped of a model's file out of this process where less than half of it is used, because
// the rest was copied elsewhere. It stays in the system's cache, and what is used comes back from there.
int ta_forget_mapped(const struct llama_model * model, ta_error * error) TA_NOEXCEPT;

int ta_backend_load(const char * path, ta_error * error) TA_NOEXCEPT;

// What a CPU module says of this processor: its own `ggml_backend_score`, which allocates.
int ta_module_score(int (*ask)(void), int * score, ta_error * error) TA_NOEXCEPT;

// `params` are llama.cpp's own. NULL with TA_OK: it said why not in its log.
int ta_model_load(const char * path, const struct llama_model_params * params, struct llama_model ** out,
                  ta_error * error) TA_NOEXCEPT;

// Multiplies a small matrix of each weight type on the CPU module that is loaded, in every kind of
// buffer that it offers. It dies where the module does: for a throw-away child process.
int ta_probe_cpu(ta_error * error) TA_NOEXCEPT;
// The same on each GPU of the backends that are loaded; refuses where they find none.
int ta_probe_gpus(ta_error * error) TA_NOEXCEPT;

// One product of a matrix on the CPU module that is loaded, with its weights as in a file (`layout` 0), or in
// the first, second, … of its own layouts. 0: that layout does not take such weights.
typedef struct {
    int64_t columns;
    int64_t rows;
    int64_t batch;    // rows of input
    int64_t experts;  // 0: one matrix for all; else so many, of which each row uses two
    int32_t times;
    int32_t threads;
} ta_product;
typedef struct {
    double error;    // the largest, as a part of the largest number
    double seconds;  // the least
} ta_product_found;
int ta_multiply(int32_t type, int32_t layout, const ta_product * asked, ta_product_found * found,
                ta_error * error) TA_NOEXCEPT;

// How far flash attention over a cache of f16 is from the same in double precision, as a part of the largest
// number.
typedef struct {
    int32_t dim;
    int32_t n_head;
    int32_t n_head_kv;
    int32_t n_tokens;
    int32_t n_cells;
    int32_t n_streams;
    int32_t threads;
    bool    is_causal;  // else each token sees cells here and there, and the first of several none
    bool    has_sinks;
    float   max_bias;
} ta_attended;
int ta_attend(const ta_attended * asked, double * off, ta_error * error) TA_NOEXCEPT;

// Into how many bytes the CPU module that is loaded lays a byte of weights of this type out anew; 0
// where it leaves them as they are.
int ta_relaid(int32_t type, double * factor, ta_error * error) TA_NOEXCEPT;

// 1: the CPU module that is loaded was built with this (`AVX512_BF16`, …) and the processor has it.
int ta_cpu_has(const char * feature, ta_error * error) TA_NOEXCEPT;

// What all threads of this process have computed so far.
double ta_cpu_seconds(void) TA_NOEXCEPT;

// A stopwatch for attention on the CPU.
typedef struct ta_attention ta_attention;

typedef struct ta_attention_shape {
    int32_t head_dim;
    int32_t n_head;
    int32_t n_head_kv;
    int32_t n_ctx;  // cells of the cache
} ta_attention_shape;

typedef struct ta_attention_case {
    bool    flash_attn;
    int32_t kv_type;  // a ggml_type that is not quantised
    int32_t rows;     // computed in one go
    int32_t n_kv;     // cells that they look at, themselves included
} ta_attention_case;

int  ta_attention_new(const ta_attention_shape * shape, int32_t n_threads, ta_attention ** out,
                      ta_error * error) TA_NOEXCEPT;
void ta_attention_free(ta_attention * attention) TA_NOEXCEPT;

// How long one layer takes. Calls are not to overlap.
int ta_attention_time(ta_attention * attention, const ta_attention_case * what, double * seconds,
                      ta_error * error) TA_NOEXCEPT;

// A stopwatch for products on the CPU, with weights of types that its module lays out anew (`ta_relaid`).
typedef struct ta_layouts ta_layouts;

int  ta_layouts_new(const int32_t * types, int32_t n_types, int32_t n_threads, ta_layouts ** out,
                    ta_error * error) TA_NOEXCEPT;
void ta_layouts_free(ta_layouts * layouts) TA_NOEXCEPT;

// How long so many rows of input take for a byte of weights in a file, of the type that was named at this
// place: with the weights as they are there, or laid out anew. Calls are not to overlap.
int ta_layouts_time(ta_layouts * layouts, int32_t place, bool anew, int32_t rows, double * seconds,
                    ta_error * error) TA_NOEXCEPT;

// For tests of our sampler: a chain of llama.cpp's own, by name and in this order, hears the history
// and then gets one row of logits after the other. What it leaves of the last row comes back; there
// is room for `n_vocab` of them. rust/shim/samplers.cpp says which values belong to which name.
typedef struct ta_sampler {
    const char *         name;
    float                values[4];
    const char * const * strings;
    size_t               n_strings;
} ta_sampler;

int ta_samplers_apply(const struct llama_vocab * vocab, const ta_sampler * samplers, int32_t n_samplers,
                      const int32_t * history, int32_t n_history, const float * rows, int32_t n_rows,
                      int32_t n_vocab, int32_t * tokens, double * probabilities, int32_t * n_left,
                      ta_error * error) TA_NOEXCEPT;

// For tests of our grammars: what llama.cpp's own says of a text. Neither may hold a zero.
#define TA_GRAMMAR_REFUSED  0  // the grammar is none, or one that llama.cpp does not take
#define TA_GRAMMAR_NO_MATCH 1
#define TA_GRAMMAR_BEGINS   2  // something has to follow
#define TA_GRAMMAR_MATCHES  3  // something may follow
int ta_grammar_try(const char * grammar, const char * text, int * verdict, ta_error * error) TA_NOEXCEPT;

// For tests of this border.
int ta_throw(ta_error * error) TA_NOEXCEPT;

#ifdef __cplusplus
}
#endif
