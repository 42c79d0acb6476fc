// libjpeg's header, and its errors as a text and a jump. A function that calls setjmp must hold no object with a destructor,
// and no callback may throw: the frames in between are C.
#pragma once

#include <cstddef>
#include <cstdio>
// libjpeg's header needs the two above.
#include <jerror.h>
#include <jpeglib.h>

#include <csetjmp>
#include <cstdint>

namespace fourfold::jpeg {

struct Errors {
  jpeg_error_mgr manager;  // first: libjpeg knows its address only
  jmp_buf back;
  char text[JMSG_LENGTH_MAX + 100];
};

inline Errors& errors_of(j_common_ptr info) { return *reinterpret_cast<Errors*>(info->err); }

// Ends the protected call with the text that is there.
[[noreturn]] inline void leave(j_common_ptr info) { longjmp(errors_of(info).back, 1); }

template <typename... Args>
[[noreturn]] void fail(j_common_ptr info, const char* format, Args... args) {
  std::snprintf(errors_of(info).text, sizeof Errors::text, format, args...);
  leave(info);
}

// Where C code expects a function pointer.
inline void set_up(Errors& errors, void (*emit)(j_common_ptr, int)) {
  jpeg_std_error(&errors.manager);
  errors.text[0] = 0;
  errors.manager.error_exit = [](j_common_ptr info) {
    (*info->err->format_message)(info, errors_of(info).text);
    leave(info);
  };
  errors.manager.emit_message = emit;
  errors.manager.output_message = [](j_common_ptr) {};
}

}  // namespace fourfold::jpeg
