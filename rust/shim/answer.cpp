// Answer → content, reasoning and tool calls, through the parser that llama.cpp made for the template.
//
// It is common_chat_peg_parse in our words, because that one prints to the log and does not say
// where an answer stopped being what its template wants. Parsing is by recursion over what the model
// wrote: the caller bounds how deep that can be nested.
#include "answer.h"
#include "guard.h"

#include "chat-peg-parser.h"

#include <memory>
#include <utility>

struct ta_answer {
    common_chat_msg message;
    bool            is_whole = false;
};

namespace {

std::unique_ptr<common_chat_peg_mapper> mapper_of(common_chat_format format, common_chat_msg & message) {
    switch (format) {
        case COMMON_CHAT_FORMAT_PEG_GEMMA4: return std::make_unique<common_chat_peg_gemma4_mapper>(message);
        case COMMON_CHAT_FORMAT_PEG_MINIMAX_M3: return std::make_unique<common_chat_peg_minimax_m3_mapper>(message);
        default: return std::make_unique<common_chat_peg_mapper>(message);
    }
}

const std::string * text_of(const common_chat_msg & message, int what, size_t index) {
    if (what == TA_ANSWER_CONTENT) return index == 0 ? &message.content : nullptr;
    if (what == TA_ANSWER_REASONING) return index == 0 ? &message.reasoning_content : nullptr;
    if (index >= message.tool_calls.size()) return nullptr;
    const common_chat_tool_call & call = message.tool_calls[index];
    switch (what) {
        case TA_ANSWER_CALL_ID: return &call.id;
        case TA_ANSWER_CALL_NAME: return &call.name;
        case TA_ANSWER_CALL_ARGUMENTS: return &call.arguments;
        default: return nullptr;
    }
}

}  // namespace

int ta_reader_read(const ta_reader * reader, const char * text, size_t length, bool is_partial,
                   ta_answer ** out, ta_error * error) noexcept {
    return ta_guard(error, [&] {
        std::call_once(reader->once, [&] { reader->parser.load(reader->saved); });
        const std::string        input = reader->beginning + std::string(text, length);
        common_peg_parse_context context(input, COMMON_PEG_PARSE_FLAG_LENIENT);
        const auto               result = reader->parser.parse(context);
        if (result.fail() && !is_partial) {
            return ta_fail(error, TA_REFUSED, "the answer is not in the form that the chat template gives to answers");
        }
        auto answer = std::make_unique<ta_answer>();
        answer->is_whole = result.success();
        mapper_of(reader->format, answer->message)->from_ast(context.ast, result);
        *out = answer.release();
        return int(TA_OK);
    });
}

bool ta_answer_text(const ta_answer * answer, int what, size_t index, const char ** text,
                    size_t * length) noexcept {
    const std::string * found = text_of(answer->message, what, index);
    if (!found) return false;
    *text   = found->data();
    *length = found->size();
    return true;
}

bool ta_answer_is_whole(const ta_answer * answer) noexcept { return answer->is_whole; }

void ta_answer_free(ta_answer * answer) noexcept { delete answer; }

void ta_reader_free(ta_reader * reader) noexcept { delete reader; }
