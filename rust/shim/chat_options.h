// How a conversation is written out, read from JSON text and checked.
#pragma once

#include "shim.h"

#include "chat.h"

#include <optional>
#include <vector>

struct ta_chat_options {
    std::vector<common_chat_tool> tools;
    common_chat_tool_choice       tool_choice = COMMON_CHAT_TOOL_CHOICE_AUTO;
    std::optional<bool>           parallel_tool_calls;  // unless it is said: what the template can do
    bool                          enable_thinking        = true;
    bool                          continue_final_message = false;
    common_reasoning_format       reasoning_format       = COMMON_REASONING_FORMAT_AUTO;
    common_json                   kwargs                 = common_json::object();
};
