// What the model needs of the processor, checked before an engine computes with it.

#include <sys/utsname.h>

#include <algorithm>
#include <fstream>
#include <set>
#include <sstream>
#include <string>

#include "decode.h"
#include "model.h"

namespace {

// Flags as Linux names them; empty where they cannot be read.
std::set<std::string> processor_flags() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const std::size_t colon = line.find(':');
    const std::string key = line.substr(0, line.find_last_not_of(" \t", colon == std::string::npos ? colon : colon - 1) + 1);
    if (colon == std::string::npos || (key != "flags" && key != "Features")) continue;
    std::istringstream words(line.substr(colon + 1));
    std::set<std::string> flags;
    for (std::string word; words >> word;) flags.insert(word);
    return flags;
  }
  return {};
}

}  // namespace

void optc::check_host() {
  utsname system{};
  const std::string machine = uname(&system) == 0 ? system.machine : "";
  const std::string wanted = kMachine;
  if (!wanted.empty() && machine != wanted)
    throw Failure(kNoRuntime, "the model was compiled for " + wanted + ", this is " + machine);
  const std::set<std::string> flags = processor_flags();
  if (flags.empty()) return;
  for (const char* flag : kEveryFlag)
    if (flags.count(flag) == 0)
      throw Failure(kNoRuntime, std::string("the processor lacks ") + flag + ": compile the model on one like it");
  const bool x86 = machine == "x86_64";
  if (x86 && !kAnyFlag.empty() &&
      std::none_of(kAnyFlag.begin(), kAnyFlag.end(), [&](const char* flag) { return flags.count(flag) > 0; }))
    throw Failure(kNoRuntime, "the processor cannot multiply the model's 8-bit weights exactly");
}
