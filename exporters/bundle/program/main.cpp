// Continue token ids greedily and print the new ones, separated by commas.

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <limits>
#include <new>
#include <string>

#include "decode.h"
#include "model.h"

namespace {

using optc::Failure;
using optc::Tokens;

constexpr const char* kHelp =
    "usage: decode (--prompt-tokens IDS | --prompt-file FILE) [options]\n"
    "\n"
    "  --prompt-tokens IDS   token ids to continue, such as 5,17,33\n"
    "  --prompt-file FILE    read them from a file, separated by commas or white space; - is standard input\n"
    "  --max-new-tokens N    most tokens to generate (default 64)\n"
    "  --ignore-eos          go on after an end-of-text token\n"
    "  --model FOLDER        the bundle (default: the folder of this program, else the present one)\n"
    "  --threads N           threads of the engine (default: its own choice)\n"
    "\n"
    "Exit codes: 0 done, 2 usage, 3 bad input, 4 the runtime is missing or cannot run the model,\n"
    "7 damaged model, 8 out of memory, 1 anything else.\n";

struct Options {
  optc::Setup setup;
  Tokens prompt;
  std::int64_t max_new_tokens = 64;
  bool ignore_eos = false;
};

std::int64_t whole(const std::string& text, const std::string& what, optc::Code code) {
  errno = 0;
  char* end = nullptr;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || std::isspace(static_cast<unsigned char>(text[0])) || *end != '\0' || errno == ERANGE)
    throw Failure(code, what + " '" + text + "' is not an integer");
  return value;
}

Tokens token_ids(std::string text) {
  std::replace_if(
      text.begin(), text.end(), [](unsigned char c) { return c == ',' || std::isspace(c); }, ' ');
  Tokens ids;
  for (std::size_t at = text.find_first_not_of(' '); at != std::string::npos;) {
    const std::size_t end = std::min(text.find(' ', at), text.size());
    const std::int64_t id = whole(text.substr(at, end - at), "token id", optc::kBadInput);
    if (id < 0 || id >= optc::kVocabSize)
      throw Failure(optc::kBadInput, "token id " + std::to_string(id) + " is outside the vocabulary, 0 to " +
                                         std::to_string(optc::kVocabSize - 1));
    ids.push_back(id);
    at = text.find_first_not_of(' ', end);
  }
  if (ids.empty()) throw Failure(optc::kBadInput, "the prompt is empty: give at least one token id");
  return ids;
}

std::string contents(const std::string& path) {
  if (path == "-") return {std::istreambuf_iterator<char>(std::cin), {}};
  std::ifstream file(path, std::ios::binary);
  std::string text{std::istreambuf_iterator<char>(file), {}};
  if (!file.is_open() || file.bad()) throw Failure(optc::kBadInput, "cannot read " + path);
  return text;
}

bool is_model(const std::string& folder) { return std::ifstream(folder + "/" + optc::kEngineFile).is_open(); }

std::string default_folder(const std::string& program) {
  const std::size_t slash = program.rfind('/');
  const std::string own = slash == std::string::npos ? "." : program.substr(0, slash);
  return is_model(own) ? own : ".";
}

Options parse(int count, char** arguments) {
  Options options;
  int prompts = 0;
  bool from_file = false;
  std::string prompt;
  for (int i = 1; i < count; ++i) {
    const std::string flag = arguments[i];
    if (flag == "--ignore-eos") {
      options.ignore_eos = true;
      continue;
    }
    const bool known = flag == "--prompt-tokens" || flag == "--prompt-file" || flag == "--max-new-tokens" ||
                       flag == "--model" || flag == "--threads";
    if (!known) throw Failure(optc::kUsage, "unknown option '" + flag + "' (see --help)");
    if (++i == count) throw Failure(optc::kUsage, flag + " needs a value");
    const std::string value = arguments[i];
    if (flag == "--model") {
      options.setup.folder = value;
    } else if (flag == "--max-new-tokens" || flag == "--threads") {
      const std::int64_t number = whole(value, flag, optc::kUsage);
      if (number < 1 || number > std::numeric_limits<int>::max())
        throw Failure(optc::kUsage, flag + " must be 1 or more");
      if (flag == "--threads")
        options.setup.threads = static_cast<int>(number);
      else
        options.max_new_tokens = number;
    } else {
      ++prompts;
      from_file = flag == "--prompt-file";
      prompt = value;
    }
  }
  if (prompts != 1) throw Failure(optc::kUsage, "give --prompt-tokens or --prompt-file, once (see --help)");
  options.prompt = token_ids(from_file ? contents(prompt) : prompt);
  return options;
}

// Room for the prompt and all new tokens but the last, which is not fed again; at most the model's context.
std::int64_t capacity(const Options& options) {
  const auto prompt = static_cast<std::int64_t>(options.prompt.size());
  const std::int64_t wanted = prompt + options.max_new_tokens;
  const std::int64_t limit = optc::kContextLength > 0 ? optc::kContextLength : wanted;
  if (prompt > limit)
    throw Failure(optc::kBadInput, "a prompt of " + std::to_string(prompt) +
                                       " tokens does not fit the context of " + std::to_string(limit));
  return std::min(wanted, limit);
}

Tokens generate(optc::Decoder& decoder, const Options& options) {
  Tokens tokens{decoder.advance(options.prompt)};
  for (std::int64_t held = static_cast<std::int64_t>(options.prompt.size());
       held < options.setup.capacity && static_cast<std::int64_t>(tokens.size()) < options.max_new_tokens; ++held) {
    const bool end = std::find(optc::kEndOfText.begin(), optc::kEndOfText.end(), tokens.back()) != optc::kEndOfText.end();
    if (end && !options.ignore_eos) break;
    tokens.push_back(decoder.advance({tokens.back()}));
  }
  return tokens;
}

int run(int count, char** arguments) {
  Options options = parse(count, arguments);
  if (options.setup.folder.empty()) options.setup.folder = default_folder(arguments[0]);
  if (!is_model(options.setup.folder))
    throw Failure(optc::kBadInput, "there is no " + std::string(optc::kEngineFile) + " in '" +
                                       options.setup.folder + "': name the bundle with --model");
  options.setup.capacity = capacity(options);
  optc::check_host();
  const auto decoder = optc::open_decoder(options.setup);
  const Tokens tokens = generate(*decoder, options);
  for (std::size_t i = 0; i < tokens.size(); ++i)
    std::printf("%s%lld", i > 0 ? "," : "", static_cast<long long>(tokens[i]));
  std::printf("\n");
  return std::fflush(stdout) == 0 ? 0 : throw Failure(optc::kOther, "cannot write to standard output");
}

}  // namespace

int main(int count, char** arguments) {
  for (int i = 1; i < count; ++i) {
    const std::string flag = arguments[i];
    if (flag == "--help" || flag == "-h") return std::printf("%s", kHelp) < 0 ? optc::kOther : 0;
  }
  try {
    return run(count, arguments);
  } catch (const Failure& failure) {
    std::fprintf(stderr, "error: %s\n", failure.what());
    return failure.code;
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "error: out of memory\n");
    return optc::kNoMemory;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return optc::kOther;
  }
}
