// What a template's answers look like, kept from rendering until an answer is read.
#pragma once

#include "shim.h"

#include "chat.h"
#include "peg-parser.h"

#include <mutex>
#include <string>

struct ta_reader {
    common_chat_format format;
    std::string        beginning;  // what of the answer stands in the prompt already
    std::string        saved;      // the parser, as llama.cpp hands it out

    mutable std::once_flag   once;
    mutable common_peg_arena parser;
};
