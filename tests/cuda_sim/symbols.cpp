#include "symbols.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <sstream>
#include <vector>

namespace cuda_sim {
namespace {

struct Frame {
  std::string function, file_and_line;
};

// From the innermost to the outermost. addr2line comes with the linker.
std::vector<Frame> frames_of(const void* code) {
  Dl_info info;
  if (!dladdr(code, &info)) return {};
  std::ostringstream command;
  command << "env -u LD_PRELOAD addr2line -Cfie '" << info.dli_fname << "' 0x" << std::hex
          << reinterpret_cast<uintptr_t>(code) - reinterpret_cast<uintptr_t>(info.dli_fbase) << " 2>/dev/null";
  FILE* const pipe = popen(command.str().c_str(), "r");
  if (!pipe) return {};
  std::string text;
  for (int c; (c = std::fgetc(pipe)) != EOF;) text += static_cast<char>(c);
  pclose(pipe);
  std::vector<Frame> frames;
  std::istringstream lines(text);
  for (Frame frame; std::getline(lines, frame.function) && std::getline(lines, frame.file_and_line);) {
    frame.file_and_line = frame.file_and_line.substr(0, frame.file_and_line.find(" ("));  // "(discriminator 2)"
    frames.push_back(frame);
  }
  return frames;
}

bool foreign(const std::string& file_and_line) {
  const bool header = file_and_line.find(".h:") != std::string::npos;
  return file_and_line.rfind("/usr/", 0) == 0 || (header && file_and_line.find("/cuda_sim/") != std::string::npos) ||
         file_and_line[0] == '?';
}

std::string last_part(const std::string& path) { return path.substr(path.rfind('/') + 1); }

}  // namespace

std::string line_of(const void* code) {
  // A return address lies behind the call.
  const std::vector<Frame> frames = frames_of(static_cast<const char*>(code) - 1);
  for (const Frame& frame : frames)
    if (!foreign(frame.file_and_line)) return last_part(frame.file_and_line);
  return frames.empty() ? "an unknown line" : last_part(frames.back().file_and_line);
}

std::string function_of(const void* code) {
  const std::vector<Frame> frames = frames_of(code);
  if (frames.empty()) return "?";
  std::string name = frames.back().function;
  const std::string anonymous = "(anonymous namespace)::";
  for (size_t at; (at = name.find(anonymous)) != std::string::npos;) name.erase(at, anonymous.size());
  name = name.substr(0, name.find('('));
  return name.substr(name.find(' ') + 1);  // without the "void" of a template
}

}  // namespace cuda_sim
