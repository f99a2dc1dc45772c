// Messages → prompt, through llama.cpp's common/chat; and what the engine and the reader of the answer
// have to know of it.
//
// llama.cpp writes the prompt and its grammar and parser. We keep whose text is whose: the template's
// tree records each of its runs in pieces, and the prompt is the first of them, give or take what
// llama.cpp has changed in it or put behind it.
#include "answer.h"
#include "chat_options.h"
#include "guard.h"
#include "template_limits.h"
#include "template_marks.h"

#include "chat-auto-parser-helpers.h"
#include "chat-auto-parser.h"
#include "chat.h"
#include "common.h"
#include "jinja/caps.h"
#include "jinja/lexer.h"
#include "jinja/runtime.h"
#include "llama.h"
#include "log.h"

#include <algorithm>
#include <ctime>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using autoparser::generation_params;
using jinja::value;

constexpr size_t MOST_RUNS    = 3;  // of a template, until a prompt is made
constexpr long   MOST_REPEATS = 1999;

// A part of the prompt, and whether it came from a message.
struct Piece {
    std::string text;
    bool        is_input;
};
using Pieces = std::vector<Piece>;

}  // namespace

struct ta_chat {
    common_chat_template   tmpl{"", "", ""};
    autoparser::autoparser analysis;
    bool                   add_bos = false;
    bool                   add_eos = false;
};

struct ta_prompt {
    Pieces                              pieces;
    std::vector<std::string>            stops;
    std::vector<std::string>            preserved;
    std::string                         grammar;
    std::string                         grammar_prefix;
    bool                                grammar_is_lazy = false;
    std::vector<common_grammar_trigger> triggers;
    std::vector<std::string>            thinking;  // the tags around it, or nothing
    bool                                is_thinking = false;
    std::unique_ptr<ta_reader>          reader;
};

namespace {

// As common_chat_templates_init does.
std::string patched(std::string source) {
    if (source.find("<|channel|>") != std::string::npos) {
        string_replace_all(source,
                           "{%- if \"<|channel|>analysis<|message|>\" in message.content or "
                           "\"<|channel|>final<|message|>\" in message.content %}",
                           "{%- if false %}");
    }
    if (source.find("[TOOL_CALLS]") != std::string::npos) {
        string_replace_all(source,
                           "{%- if (message['content'] is none or message['content'] == '' or "
                           "message['content']|length == 0) and (message['tool_calls'] is not defined or "
                           "message['tool_calls'] is none or message['tool_calls']|length == 0) %}",
                           "{%- if false %}");
    }
    return source;
}

// The engine quotes a page of source around each reason; what is kept is the reason and the place.
std::string reason_of(const std::string & said) {
    const size_t error = said.rfind("Error: ");
    std::string  reason = error == std::string::npos ? said : said.substr(error + 7);
    const size_t place = said.find(" at line ");
    if (place != std::string::npos && error != std::string::npos) {
        reason += " (" + said.substr(place + 4, said.find(" in source", place) - place - 4) + ")";
    }
    return reason;
}

// Runs what is about a template: every exception is a fault of the template or of the messages.
template <class F>
int judge_template(const Limits & limits, ta_error * error, F && body) {
    try {
        const int status = body();
        limits.check();
        return status;
    } catch (const std::bad_alloc &) {
        throw;
    } catch (const std::exception & thrown) {
        const char * exceeded = limits.exceeded();
        return ta_fail(error, TA_REFUSED, exceeded ? exceeded : reason_of(thrown.what()).c_str());
    }
}

std::string today(const char * format) {
    const std::time_t now = std::time(nullptr);
    char text[32] = "";
    std::strftime(text, sizeof(text), format, std::localtime(&now));
    return text;
}

// The runs of a template in this thread, from when it was made.
struct Recording {
    static thread_local Recording * current;

    std::vector<Pieces> runs;

    Recording() { current = this; }
    ~Recording() { current = nullptr; }
};

thread_local Recording * Recording::current = nullptr;

// llama.cpp marks everything that it gives to a template as input. A role is a word and no text of a
// user: templates write `'<|' + role + '|>'`.
void mark_inputs(jinja::context & ctx) {
    for (const char * name : {"bos_token", "eos_token"}) mark(ctx.get_val(name), false);
    for (const char * name : {"messages", "tools"}) mark(ctx.get_val(name), true);
    const value messages = ctx.get_val("messages");
    value       none     = jinja::mk_val<jinja::value_none>();
    for (const value & message : messages->val_arr) mark(message->at(std::string("role"), none), false);
}

// A whole template as one statement.
struct Recorded : jinja::statement {
    jinja::program program;
    explicit Recorded(jinja::program && all) : program(std::move(all)) { pos = 0; }
    value execute_impl(jinja::context & ctx) const override {
        if (Recording::current) mark_inputs(ctx);
        const auto text = jinja::runtime::gather_string_parts(jinja::runtime(ctx).execute(program));
        if (Recording::current) {
            Pieces & run = Recording::current->runs.emplace_back();
            for (const auto & part : text->val_str.parts) run.push_back({part.val, part.is_input});
        }
        return text;
    }
};

jinja::program recorded(jinja::program && program) {
    jinja::program whole;
    whole.body.push_back(std::make_unique<Recorded>(std::move(program)));
    return whole;
}

void cut_front(Pieces & pieces, size_t bytes) {
    for (Piece & piece : pieces) {
        const size_t cut = std::min(bytes, piece.text.size());
        piece.text.erase(0, cut);
        bytes -= cut;
    }
}

void cut_back(Pieces & pieces, size_t bytes) {
    for (auto piece = pieces.rbegin(); piece != pieces.rend(); ++piece) {
        const size_t cut = std::min(bytes, piece->text.size());
        piece->text.resize(piece->text.size() - cut);
        bytes -= cut;
    }
}

std::string joined(const Pieces & pieces) {
    std::string text;
    for (const Piece & piece : pieces) text += piece.text;
    return text;
}

// What stands before a message of the assistant that goes on, and that message.
void append_continued(Pieces & pieces, const std::string & tail, const common_chat_msg & message) {
    size_t end = 0;
    for (const std::string & said : {message.reasoning_content, message.render_content()}) {
        const size_t found = said.empty() ? std::string::npos : tail.find(said, end);
        if (found == std::string::npos) continue;
        pieces.push_back({tail.substr(end, found - end), false});
        pieces.push_back({said, true});
        end = found + said.size();
    }
    pieces.push_back({tail.substr(end), false});
}

// The pieces of a prompt that is a run of the template, but for one place that llama.cpp changed.
Pieces changed(const Pieces & run, const std::string & prompt) {
    const std::string text = joined(run);
    const size_t      most = std::min(text.size(), prompt.size());
    size_t            same = 0, end = 0;
    while (same < most && text[same] == prompt[same]) ++same;
    while (end < most - same && text[text.size() - 1 - end] == prompt[prompt.size() - 1 - end]) ++end;
    Pieces pieces = run, after = run;
    cut_back(pieces, text.size() - same);
    cut_front(after, text.size() - end);
    pieces.push_back({prompt.substr(same, prompt.size() - end - same), false});
    pieces.insert(pieces.end(), after.begin(), after.end());
    return pieces;
}

Pieces pieces_of(const ta_chat & chat, const Recording & recording, const common_chat_params & made,
                 const generation_params & params) {
    if (recording.runs.empty()) throw std::runtime_error("it was not run");
    Pieces            pieces = recording.runs[0];
    const std::string text   = joined(pieces);
    if (chat.add_bos && string_starts_with(text, chat.tmpl.bos_token())) {
        cut_front(pieces, chat.tmpl.bos_token().size());
    }
    if (chat.add_eos && string_ends_with(text, chat.tmpl.eos_token())) {
        cut_back(pieces, chat.tmpl.eos_token().size());
    }
    const std::string tail = params.has_continuation() ? made.generation_prompt : "";
    const std::string head = made.prompt.substr(0, made.prompt.size() - std::min(tail.size(), made.prompt.size()));
    if (joined(pieces) != head) pieces = changed(pieces, head);
    if (!tail.empty()) append_continued(pieces, tail, params.continue_msg);
    return pieces;
}

// What follows is what common_chat_templates_apply does, which takes its own templates only.

void join_system(common_json & list, const std::vector<common_chat_msg> & messages) {
    if (list.size() > 1) {  // said with the first turn, where templates know no system
        list[1]["content"] = messages[0].render_content("\n") + "\n" + messages[1].render_content("\n");
    }
    list.erase(0);
}

// What is no JSON stays a text: it is a model's, and the conversation has to go on.
void parse_arguments(common_json & message) {
    if (!message.contains("tool_calls")) return;
    for (auto & call : message["tool_calls"]) {
        const auto parsed = common_json::parse_no_throw(call["function"]["arguments"].get<std::string>());
        if (!parsed.is_discarded()) call["function"]["arguments"] = parsed;
    }
}

common_json prepared(const common_chat_template & tmpl, std::vector<common_chat_msg> messages) {
    const jinja::caps caps       = tmpl.original_caps();
    const bool        only_typed = !caps.supports_string_content && caps.supports_typed_content;
    const bool        only_text  = caps.supports_string_content && !caps.supports_typed_content;
    if (tmpl.source().find("You have access to the following functions in JSONSchema format") != std::string::npos) {
        for (common_chat_msg & message : messages) {
            message.content           = trim_whitespace(message.content);
            message.reasoning_content = trim_whitespace(message.reasoning_content);
            for (auto & part : message.content_parts) part.text = trim_whitespace(part.text);
        }
    }
    common_json list = common_chat_msgs_to_json_oaicompat(messages, only_text);
    for (auto & message : list) {
        if (message["role"] == "developer" && tmpl.source().find("<|channel|>") == std::string::npos) {
            message["role"] = "system";
        }
        if (only_typed && message.contains("content") && message["content"].is_string()) {
            const std::string text = message["content"].get<std::string>();
            message["content"] = common_json::array({common_json{{"type", "text"}, {"text", text}}});
        }
        if (caps.supports_object_arguments) parse_arguments(message);
    }
    const bool has_system = !messages.empty() && list[0]["role"] == "system";
    if (has_system && !caps.supports_system_role) join_system(list, messages);
    return list;
}

generation_params params_of(const ta_chat & chat, const ta_chat_options & options,
                            std::vector<common_chat_msg> messages, bool add_generation_prompt) {
    generation_params params;
    params.tools                 = common_chat_tools_to_json_oaicompat(options.tools);
    params.tool_choice           = options.tool_choice;
    params.parallel_tool_calls   = options.parallel_tool_calls.value_or(chat.tmpl.caps.supports_parallel_tool_calls);
    params.reasoning_format      = options.reasoning_format;
    params.enable_thinking       = options.enable_thinking;
    params.add_generation_prompt = add_generation_prompt;
    params.add_bos               = chat.add_bos;
    params.add_eos               = chat.add_eos;
    params.extra_context = common_json{{"datetime", today("%b %d %Y")}, {"date_string", today("%d %b %Y")}};
    for (auto given = options.kwargs.begin(); given != options.kwargs.end(); ++given) {
        params.extra_context[given.key()] = given.value();
    }
    if (options.continue_final_message && !messages.empty()) {
        params.add_generation_prompt = false;
        params.continue_msg          = messages.back();
        messages.pop_back();
        const common_chat_msg & said = params.continue_msg;
        const bool thinks = !said.reasoning_content.empty() && said.content.empty() && said.content_parts.empty();
        params.continue_final_message =
            thinks ? COMMON_CHAT_CONTINUATION_REASONING : COMMON_CHAT_CONTINUATION_CONTENT;
    }
    params.messages = prepared(chat.tmpl, std::move(messages));
    return params;
}

void check_tools(const ta_chat & chat, bool required) {
    const jinja::caps & caps = chat.tmpl.caps;
    if (!caps.supports_tools && !caps.supports_tool_calls) throw std::runtime_error("it knows no tools");
    const bool calls = chat.analysis.analysis_complete && caps.supports_tool_calls &&
                       chat.analysis.tools.format.mode != autoparser::tool_format::NONE;
    if (required && !calls) throw std::runtime_error("it does not show how a tool is called");
}

common_chat_params made_by(const ta_chat & chat, generation_params & params) {
    if (auto special = common_chat_try_specialized_template(chat.tmpl, chat.tmpl.source(), params)) {
        return *special;
    }
    const auto & analysis  = chat.analysis;
    const bool   has_tools = params.tools.is_array() && params.tool_choice != COMMON_CHAT_TOOL_CHOICE_NONE;
    if (has_tools) check_tools(chat, params.tool_choice == COMMON_CHAT_TOOL_CHOICE_REQUIRED);
    const bool thinks = analysis.reasoning.mode != autoparser::reasoning_mode::NONE;
    const bool is_plain = !thinks && !has_tools && !analysis.content.is_always_wrapped();
    if (!params.has_continuation() && (is_plain || !analysis.analysis_complete)) {
        common_chat_params made;  // without a parser: an answer is content and nothing else
        made.prompt           = common_chat_template_direct_apply(chat.tmpl, params);
        made.additional_stops = analysis.additional_stops;
        return made;
    }
    auto made = autoparser::peg_generator::generate_parser(chat.tmpl, params, analysis);
    if (thinks) {
        made.thinking_start_tag = analysis.reasoning.start;
        made.thinking_end_tags  = {analysis.reasoning.end};
    }
    return made;
}

// Whether a text ends between the tags.
bool ends_inside(const std::string & text, const std::string & start, const std::string & end) {
    const size_t begun = start.empty() ? 0 : text.rfind(start);
    return begun != std::string::npos && text.find(end, begun + start.size()) == std::string::npos;
}

// Repetitions of more than the grammar's parser takes have no end, as in llama.cpp's own schemas.
std::string bounded(const std::string & grammar) {
    std::string result;
    char        quote = 0;
    for (size_t at = 0; at < grammar.size(); ++at) {
        const char c = grammar[at];
        const size_t comma = c == '{' && !quote ? grammar.find_first_not_of("0123456789", at + 1) : std::string::npos;
        const size_t close = comma != std::string::npos && grammar[comma] == ','
                                 ? grammar.find_first_not_of("0123456789", comma + 1) : std::string::npos;
        if (close != std::string::npos && close > comma + 1 && grammar[close] == '}' &&
            (close - comma > 10 || std::stol(grammar.substr(comma + 1, close - comma - 1)) > MOST_REPEATS)) {
            result += grammar.substr(at, comma + 1 - at) + "}";
            at = close;
            continue;
        }
        result += c;
        if (quote && c == '\\' && at + 1 < grammar.size()) {
            result += grammar[++at];
        } else if (quote) {
            if (c == quote) quote = 0;
        } else if (c == '"' || c == '[') {
            quote = c == '[' ? ']' : '"';
        }
    }
    return result;
}

// llama.cpp's grammar of a required call lets the model talk first, for as long as it likes. The words
// are the last text before the calls: `root ::= "…" (thoughts)? space until-12? tool-calls`.
std::string without_words(std::string grammar) {
    const size_t root = grammar.find("root ::= ");
    if (root == std::string::npos || (root > 0 && grammar[root - 1] != '\n')) return grammar;
    size_t words = std::string::npos;
    int    depth = 0;
    bool   quoted = false;
    for (size_t at = root; at < grammar.size() && grammar[at] != '\n'; ++at) {
        const char c = grammar[at];
        if (quoted && c == '\\') ++at;
        if (c == '"') quoted = !quoted;
        if (!quoted && (c == '(' || c == ')')) depth += c == '(' ? 1 : -1;
        if (!quoted && depth == 0 && grammar.compare(at, 7, " until-") == 0) words = at;
    }
    if (words == std::string::npos) return grammar;
    size_t end = grammar.find_first_not_of("0123456789", words + 7);
    if (end != std::string::npos && grammar[end] == '?') ++end;
    return grammar.erase(words, end - words);
}

std::unique_ptr<ta_prompt> written(const ta_chat & chat, generation_params params) {
    Recording  recording;
    const auto made   = made_by(chat, params);
    auto       prompt = std::make_unique<ta_prompt>();
    prompt->pieces    = pieces_of(chat, recording, made, params);
    prompt->stops     = made.additional_stops;
    prompt->preserved = made.preserved_tokens;
    prompt->grammar   = bounded(made.grammar);
    if (params.tool_choice == COMMON_CHAT_TOOL_CHOICE_REQUIRED) prompt->grammar = without_words(prompt->grammar);
    prompt->grammar_is_lazy = made.grammar_lazy;
    if (!made.grammar_lazy) prompt->grammar_prefix = made.generation_prompt;
    if (made.grammar_lazy) prompt->triggers = made.grammar_triggers;
    if (!made.thinking_end_tags.empty()) {
        prompt->thinking    = {trim_whitespace(made.thinking_start_tag), trim_whitespace(made.thinking_end_tags[0])};
        prompt->is_thinking = ends_inside(made.generation_prompt, prompt->thinking[0], prompt->thinking[1]);
    }
    if (!made.parser.empty()) {
        prompt->reader            = std::make_unique<ta_reader>();
        prompt->reader->format    = made.format;
        prompt->reader->beginning = made.generation_prompt;
        prompt->reader->saved     = made.parser;
    }
    return prompt;
}

std::string text_of(const llama_vocab * vocab, llama_token token) {
    return token == LLAMA_TOKEN_NULL ? std::string() : common_token_to_piece(vocab, token, true);
}

const std::string * at(const std::vector<std::string> & texts, size_t index) {
    return index < texts.size() ? &texts[index] : nullptr;
}

const std::string * trigger_at(const ta_prompt & prompt, common_grammar_trigger_type type, size_t index) {
    for (const common_grammar_trigger & trigger : prompt.triggers) {
        if (trigger.type == type && index-- == 0) return &trigger.value;
    }
    return nullptr;
}

const std::string * text_of(const ta_prompt & prompt, int what, size_t index) {
    const bool has_grammar = !prompt.grammar.empty() && index == 0;
    switch (what) {
        case TA_PROMPT_STOP: return at(prompt.stops, index);
        case TA_PROMPT_PRESERVED: return at(prompt.preserved, index);
        case TA_PROMPT_THINKING: return at(prompt.thinking, index);
        case TA_PROMPT_GRAMMAR: return has_grammar ? &prompt.grammar : nullptr;
        case TA_PROMPT_GRAMMAR_PREFIX: return has_grammar ? &prompt.grammar_prefix : nullptr;
        case TA_PROMPT_TRIGGER_WORD: return trigger_at(prompt, COMMON_GRAMMAR_TRIGGER_TYPE_WORD, index);
        case TA_PROMPT_TRIGGER_PATTERN: return trigger_at(prompt, COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN, index);
        case TA_PROMPT_TRIGGER_PATTERN_FULL: return trigger_at(prompt, COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN_FULL, index);
        default: return nullptr;
    }
}

}  // namespace

int ta_chat_new(const llama_model * model, const char * source, size_t length, ta_chat ** out,
                ta_error * error) noexcept {
    return ta_guard(error, [&] {
        static std::once_flag silenced;  // common/ logs to stderr, from a thread of its own
        std::call_once(silenced, [] { common_log_set_verbosity_thold(-1); });

        auto   chat = std::make_unique<ta_chat>();
        Limits limits;
        return judge_template(limits, error, [&] {
            const llama_vocab * vocab = llama_model_get_vocab(model);
            chat->add_bos      = llama_vocab_get_add_bos(vocab);
            chat->add_eos      = llama_vocab_get_add_eos(vocab);
            chat->tmpl.bos_tok = text_of(vocab, llama_vocab_bos(vocab));
            chat->tmpl.eos_tok = text_of(vocab, llama_vocab_eos(vocab));
            const auto lexed   = jinja::lexer().tokenize(patched(std::string(source, length)));
            chat->tmpl.src     = lexed.source;
            chat->tmpl.prog    = recorded(limited(lexed));
            chat->tmpl.caps    = jinja::caps_get(chat->tmpl.prog);
            limits.check();
            try {
                chat->analysis.analyze_template(chat->tmpl);
            } catch (const std::exception &) {
                limits.check();  // one that refuses the analysis' conversations can still render ours
            }
            *out = chat.release();
            return int(TA_OK);
        });
    });
}

void ta_chat_free(ta_chat * chat) noexcept { delete chat; }

int ta_chat_apply(const ta_chat * chat, const ta_chat_options * options, const char * messages, size_t length,
                  bool add_generation_prompt, ta_prompt ** out, ta_error * error) noexcept {
    return ta_guard(error, [&] {
        std::vector<common_chat_msg> list;
        const int status = judge_template(Limits(), error, [&] {
            list = common_chat_msgs_parse_oaicompat(common_json::parse(std::string(messages, length)));
            return int(TA_OK);
        });
        if (status != TA_OK) return status;
        size_t bytes = length;
        for (const common_chat_tool & tool : options->tools) bytes += tool.description.size() + tool.parameters.size();
        Limits limits(MOST_RUNS * list.size(), MOST_RUNS * bytes);
        return judge_template(limits, error, [&] {
            *out = written(*chat, params_of(*chat, *options, std::move(list), add_generation_prompt)).release();
            return int(TA_OK);
        });
    });
}

bool ta_prompt_piece(const ta_prompt * prompt, size_t index, const char ** text, size_t * length,
                     bool * is_input) noexcept {
    if (index >= prompt->pieces.size()) return false;
    *text     = prompt->pieces[index].text.data();
    *length   = prompt->pieces[index].text.size();
    *is_input = prompt->pieces[index].is_input;
    return true;
}

bool ta_prompt_text(const ta_prompt * prompt, int what, size_t index, const char ** text, size_t * length) noexcept {
    const std::string * found = text_of(*prompt, what, index);
    if (!found) return false;
    *text   = found->data();
    *length = found->size();
    return true;
}

bool ta_prompt_grammar_is_lazy(const ta_prompt * prompt) noexcept { return prompt->grammar_is_lazy; }

bool ta_prompt_is_thinking(const ta_prompt * prompt) noexcept { return prompt->is_thinking; }

ta_reader * ta_prompt_take_reader(ta_prompt * prompt) noexcept { return prompt->reader.release(); }

void ta_prompt_free(ta_prompt * prompt) noexcept { delete prompt; }
