// What the command line (main.cpp) and an engine (genai.cpp or aotinductor.cpp) agree on.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace optc {

using Tokens = std::vector<std::int64_t>;

// Exit codes, as optc's own: 0 done.
enum Code { kOther = 1, kUsage = 2, kBadInput = 3, kNoRuntime = 4, kDamaged = 7, kNoMemory = 8 };

struct Failure : std::runtime_error {
  Failure(Code reason, const std::string& message) : std::runtime_error(message), code(reason) {}
  Code code;
};

// One sequence on an engine.
class Decoder {
 public:
  virtual ~Decoder() = default;
  // Append tokens to the sequence; the likeliest next token, the first one among equals.
  virtual std::int64_t advance(const Tokens& tokens) = 0;
};

struct Setup {
  std::string folder;         // of model.onnx or model.pt2
  std::int64_t capacity = 0;  // most tokens that will be appended
  int threads = 0;            // of the engine; 0 is its own choice
};

// Throws Failure when this machine cannot run the model.
void check_host();

// Throws Failure.
std::unique_ptr<Decoder> open_decoder(const Setup& setup);

}  // namespace optc
